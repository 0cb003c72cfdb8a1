"""How alike the words of a prompt and of an adapter's samples are. Numbers and texts only; nothing is looked up."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

#: Sorted 64-bit hashes of the distinct n-grams of a text, shape (n,).
Grams = NDArray[np.uint64]

#: Characters that are read at either end of a longer text, where instructions stand.
_END: Final = 512
#: Neighbouring tokens that are looked at together, at most.
_LONGEST: Final = 3
#: How much of one occurrence is taken for chance.
_CHANCE: Final = 0.9
#: Thai, Lao, Tibetan, Burmese, Khmer, kana and the characters of Chinese: written without spaces between words, so a
#: run of them would be one token that no other text has.
_UNSPACED: Final = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN: Final = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
# Odd numbers of 64 bits, whose products spread over all bits.
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)
_CHAIN: Final = np.uint64(0xD6E8FEB86659FD93)
_SHIFT: Final = np.uint64(32)


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """The n-grams of an adapter's samples.

    ``grams`` (n,) are the distinct ones, sorted; ``counts`` (n,) in how many of the ``samples`` each occurs; ``norm``
    the root of the sum of the squared shares ``counts / samples``.
    """

    grams: Grams
    counts: NDArray[np.float32]
    samples: int
    norm: float

    @property
    def size_bytes(self) -> int:
        return self.grams.nbytes + self.counts.nbytes

    @property
    def steady_norm(self) -> float:
        """The norm that many samples would show, estimated from those there are.

        An n-gram of one sample in five has a share of 0.2, and would mostly have next to none among a hundred. So an
        n-gram's own occurrence is taken off, but for a tenth, without which one sample would leave nothing.
        """
        return float(np.sqrt(self.norm**2 - _CHANCE * float(self.counts.sum()) / self.samples**2))


def grams(text: str) -> Grams:
    """The words, signs, and runs of two and three of them that a text has, each once; none for one without any.

    Case and the width of letters do not count. Of a text above 1,024 characters the two ends are read. Scripts without
    spaces give single characters and runs of them.
    """
    if len(text) > 2 * _END:
        text = f"{text[:_END]}\n{text[-_END:]}"
    words = _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    # Lone surrogates have no bytes in UTF-8.
    tokens = np.array([zlib.crc32(word.encode(errors="replace")) for word in words], dtype=np.uint64) * _SPREAD
    runs, found = tokens, [tokens]
    for length in range(1, min(_LONGEST, len(tokens))):
        runs = (runs[:-1] ^ (runs[:-1] >> _SHIFT)) * _CHAIN + tokens[length:]
        found.append(runs)
    return np.unique(np.concatenate(found))


def profile(texts: Sequence[str]) -> Profile | None:
    """The profile of an adapter with these samples; None where they have no word or sign at all."""
    found = [own for text in texts if len(own := grams(text))]
    if not found:
        return None
    distinct, counts = np.unique(np.concatenate(found), return_counts=True)
    shares = counts / len(found)
    return Profile(distinct, counts.astype(np.float32), len(found), float(np.sqrt(np.sum(shares * shares))))


def likeness(prompt: Grams, profiles: Sequence[Profile]) -> NDArray[np.float64]:
    """How much of a prompt's wording each of some adapters shares, (len(profiles),); comparable within one call only.

    The sum, over the prompt's n-grams, of the share of an adapter's samples that have it, times the squared weight of
    the n-gram, over the adapter's steady norm. The weight, ln((N + 1) / (d + 1)) + 1, falls with the number d of all N
    samples of these adapters that have the n-gram: what all of them say tells none from another.
    """
    if not profiles:
        return np.zeros(0)
    counts = np.stack([_counts(prompt, one) for one in profiles])
    samples = np.array([one.samples for one in profiles], dtype=np.float64)
    weights = np.log((samples.sum() + 1) / (counts.sum(axis=0) + 1)) + 1
    shared: NDArray[np.float64] = (counts @ (weights * weights)) / (samples * [one.steady_norm for one in profiles])
    return shared


def _counts(prompt: Grams, one: Profile) -> NDArray[np.float64]:
    """In how many of an adapter's samples each n-gram of the prompt occurs."""
    places = np.searchsorted(one.grams, prompt)
    places[places == len(one.grams)] = 0
    counts: NDArray[np.float64] = np.where(one.grams[places] == prompt, one.counts[places], 0.0).astype(np.float64)
    return counts
