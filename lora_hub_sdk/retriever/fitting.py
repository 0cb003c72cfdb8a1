"""Whether an adapter fits a prompt at all: the words they share and their cosine, held against a calibrated bound."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.lexicon import Grams, Profile, grams
from lora_hub_sdk.retriever.reranker import CANDIDATES
from lora_hub_sdk.types import Adapter, Hit

#: The share that an n-gram of no sample counts for: one sample of twenty adapters with twenty each.
_UNSEEN: Final = 1 / 400
#: Prompts whose adapters' profiles are in memory at once.
_PROMPTS: Final = 20


@dataclass(frozen=True, slots=True)
class FitRule:
    """An adapter fits where ``wording + weight * cosine`` is at least ``min_fit``.

    Where its samples were not kept, so that it has no wording, it fits where its cosine is at least ``min_score``.

    Raises:
        ConfigurationError: a value that is no finite number.
    """

    weight: float
    min_fit: float
    min_score: float

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                raise ConfigurationError(f"{name}={value!r}: expected a finite number")

    def as_text(self) -> str:
        """As the registry keeps it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> FitRule:
        """From what ``as_text`` made."""
        return cls(**json.loads(text))

    def fits(self, cosines: Sequence[float], prompt: Grams, profiles: Sequence[Profile | None]) -> NDArray[np.bool_]:
        """Which of a prompt's nearest adapters fit it, (n,). ``cosines`` and ``profiles`` in the same order."""
        scores = np.asarray(cosines, dtype=np.float64)
        shared = wording(prompt, profiles)
        unknown = np.isnan(shared)
        return np.where(unknown, scores >= self.min_score, shared + self.weight * scores >= self.min_fit)


def fitting_hits(
    rule: FitRule,
    prompts: Sequence[str],
    found: Sequence[Sequence[Hit]],
    profiles: Callable[[Iterable[Adapter]], Mapping[int, Profile | None]],
) -> list[list[Hit]]:
    """The hits of each prompt that fit, in their order; those behind the first 50 never do.

    Args:
        found: at least the 50 nearest adapters of each prompt, first, whatever order they were put in.
        profiles: gives the profiles of adapters by id.
    """
    kept: list[list[Hit]] = []
    for prompt, hits, known in _with_profiles(prompts, [hits[:CANDIDATES] for hits in found], profiles):
        fits = rule.fits([hit.score for hit in hits], prompt, known)
        kept.append([hit for hit, fit in zip(hits, fits, strict=True) if fit])
    return kept


def hit_wordings(
    prompts: Sequence[str],
    found: Sequence[Sequence[Hit]],
    profiles: Callable[[Iterable[Adapter]], Mapping[int, Profile | None]],
) -> list[NDArray[np.float64]]:
    """The ``wording`` of each prompt's hits among these, (hits,)."""
    return [wording(prompt, known) for prompt, _, known in _with_profiles(prompts, found, profiles)]


def _with_profiles(
    prompts: Sequence[str],
    found: Sequence[Sequence[Hit]],
    profiles: Callable[[Iterable[Adapter]], Mapping[int, Profile | None]],
) -> Iterator[tuple[Grams, Sequence[Hit], list[Profile | None]]]:
    """Each prompt's n-grams, its hits, and their profiles."""
    for start in range(0, len(prompts), _PROMPTS):
        rows = found[start : start + _PROMPTS]
        known = profiles(hit.adapter for hits in rows for hit in hits)
        for prompt, hits in zip(prompts[start : start + _PROMPTS], rows, strict=True):
            yield grams(prompt), hits, [known[hit.adapter.id] for hit in hits]


def wording(prompt: Grams, profiles: Sequence[Profile | None]) -> NDArray[np.float64]:
    """How much of a prompt's wording each of its nearest adapters shares, (n,), 0 or more; NaN without a profile.

    The sum, over the prompt's n-grams, of the share of an adapter's samples that have it, times the squared weight of
    the n-gram, over the adapter's steady norm and the prompt's own. The weight, ln((1 + c) / (s + c)) + 1 with c of
    1/400, falls with the mean share s over these adapters. Unlike ``lexicon.likeness`` it can be compared between
    prompts, as what a prompt says and no sample does makes it smaller; and it goes by shares alone, not by counts, so
    that a sample which was left out of its adapter is scored as any other prompt.
    """
    found = np.full(len(profiles), np.nan)
    known = [place for place, one in enumerate(profiles) if one is not None]
    if not known or not len(prompt):
        return found
    shares, norms = np.zeros((len(known), len(prompt))), np.ones(len(known))
    for row, place in enumerate(known):
        one = profiles[place]
        assert one is not None
        at = np.minimum(np.searchsorted(one.grams, prompt), len(one.grams) - 1)
        shares[row] = np.where(one.grams[at] == prompt, one.counts[at], 0.0) / one.samples
        norms[row] = one.steady_norm
    weights = np.log((1 + _UNSEEN) / (shares.mean(axis=0) + _UNSEEN)) + 1
    squares = weights * weights
    found[known] = shares @ squares / (norms * np.sqrt(squares.sum()))
    return found
