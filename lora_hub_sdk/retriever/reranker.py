"""Puts the adapters nearest to a prompt in order by their samples' words too."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.retriever.lexicon import Grams, Profile, grams, likeness, profile
from lora_hub_sdk.types import Adapter, Hit

#: How many of the nearest are put in order; further ones keep their places behind.
CANDIDATES: Final = 50
#: Samples of one adapter whose words are looked at.
_MOST_SAMPLES: Final = 100
#: Prompts whose candidates' profiles are in memory at once: 20 x 50 of 30 KB are 30 MB.
_PROMPTS: Final = 20
#: What an entry takes beside its arrays.
_ENTRY_BYTES: Final = 256
#: Relevances are one at this many digits; two candidates of opposite orders differ by rounding alone.
_DIGITS: Final = 6


def relevance(cosines: ArrayLike, prompt: Grams, profiles: Sequence[Profile | None]) -> NDArray[np.float64]:
    """What a prompt's candidates are ordered by, higher is better; comparable within one call only.

    The sum of two standard scores over the candidates: of the cosine, and of the likeness of words. The fewer the
    samples that an adapter's words are known by, the more its cosine stands in for its words: at n samples to the share
    1 / (n + 1), and wholly where there is no profile. Nobody ranks lower for having kept the samples back.

    Args:
        cosines: (c,) of the candidates.
        profiles: of the same candidates; None where no samples are known.
    """
    near = _standard(np.asarray(cosines, dtype=np.float64))
    known = [one for one in profiles if one is not None]
    have = np.array([one is not None for one in profiles], dtype=bool)
    samples, words = np.zeros(len(near)), np.zeros(len(near))
    samples[have] = [one.samples for one in known]
    words[have] = _standard(likeness(prompt, known))
    share = samples / (samples + 1) if len(known) > 1 else 0.0
    found: NDArray[np.float64] = np.round(2 * near + share * (words - near), _DIGITS)
    return found


class LexicalReranker:
    """Puts hits in order by ``relevance``. Thread-safe.

    Profiles are made from the samples in SQL and kept, the least recently used out first. A kept one counts only for
    the adapter as it was when it was made: whatever changes an adapter's samples changes its ``updated_at``, and an id
    is never given to another adapter.

    Args:
        budget_bytes: what the kept profiles may take; one of 20 samples has about 30 KB.
    """

    def __init__(self, registry: Registry, budget_bytes: int = 64 << 20) -> None:
        self._registry = registry
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[int, tuple[datetime, Profile | None]] = OrderedDict()
        self._size = 0

    @property
    def size_bytes(self) -> int:
        """What the kept profiles take."""
        return self._size

    def rerank(self, prompts: Sequence[str], found: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The hits of each prompt, nearest first, with the first 50 in order of relevance.

        These get their ``relevance``; equally relevant ones keep their order. No hit is lost and no score changes.
        """
        ordered: list[list[Hit]] = []
        for start in range(0, len(prompts), _PROMPTS):
            rows = found[start : start + _PROMPTS]
            profiles = self.profiles(hit.adapter for hits in rows for hit in hits[:CANDIDATES])
            for prompt, hits in zip(prompts[start : start + _PROMPTS], rows, strict=True):
                ordered.append(_ordered(prompt, hits, profiles))
        return ordered

    def profiles(self, adapters: Iterable[Adapter]) -> dict[int, Profile | None]:
        """The profiles of adapters by id; None for those whose samples were not kept. One query reads what is new."""
        asked = {adapter.id: adapter for adapter in adapters}
        found: dict[int, Profile | None] = {}
        with self._lock:
            for number, adapter in asked.items():
                entry = self._held.get(number)
                if entry is not None and entry[0] == adapter.updated_at:
                    self._held.move_to_end(number)
                    found[number] = entry[1]
        missing = [number for number in asked if number not in found]
        if missing:
            # Read after the adapters were: what is kept under their time is never older than it.
            texts = self._registry.samples_of(missing, _MOST_SAMPLES)
            made = {number: profile(texts.get(number, ())) for number in missing}
            self._keep((number, asked[number].updated_at, one) for number, one in made.items())
            found |= made
        return found

    def _keep(self, made: Iterable[tuple[int, datetime, Profile | None]]) -> None:
        with self._lock:
            for number, changed, one in made:
                before = self._held.pop(number, None)
                self._size += _size(one) - (0 if before is None else _size(before[1]))
                self._held[number] = (changed, one)
            while self._size > self._budget:
                _, (_, oldest) = self._held.popitem(last=False)
                self._size -= _size(oldest)


def _ordered(prompt: str, hits: Sequence[Hit], profiles: dict[int, Profile | None]) -> list[Hit]:
    first, rest = hits[:CANDIDATES], hits[CANDIDATES:]
    if not first:
        return []
    scores = relevance([hit.score for hit in first], grams(prompt), [profiles[hit.adapter.id] for hit in first])
    # Stable, so that equals keep the order that they came in.
    told = [replace(hit, relevance=float(score)) for hit, score in zip(first, scores, strict=True)]
    return [*sorted(told, key=lambda hit: -(hit.relevance or 0.0)), *rest]


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard scores; 0 where all values are equal."""
    spread = float(values.std()) if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 1e-9 else np.zeros_like(values)


def _size(one: Profile | None) -> int:
    return _ENTRY_BYTES + (0 if one is None else one.size_bytes)
