"""How much each adapter of a route counts, by what its search told of it. Pure.

A weighting is a vector of logits, one for each hit, and a map from logits to weights. Both maps are regularised
prediction maps in the sense of Blondel, Martins and Niculae (arXiv 1901.02324): softmax, and 1.5-entmax, whose weights
of what lies far behind are exactly 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

#: LORAUTER's temperature for softmax weights (arXiv 2601.21795).
SIMILARITY_TEMPERATURE: Final = 0.2
#: A smaller weight changes no answer, and its adapter would be loaded and multiplied all the same.
_LEAST: Final = 0.01
#: Weightings that ``hub.fit_weights`` finds the numbers of.
LEARNED: Final = ("fitted", "sparse", "gate")
#: Every name that ``Routing.weights`` may have.
WEIGHTINGS: Final = ("uniform", "similarity", *LEARNED)


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """exp(z_i) / sum exp(z_j) along the last axis; a logit of -inf has weight 0."""
    rows = np.asarray(logits, dtype=np.float64)
    raised = np.exp(rows - rows.max(axis=-1, keepdims=True))
    found: NDArray[np.float64] = raised / raised.sum(axis=-1, keepdims=True)
    return found


def entmax(logits: ArrayLike) -> NDArray[np.float64]:
    """1.5-entmax along the last axis: max(z_i / 2 - t, 0)^2 with the t that makes the weights sum to 1.

    Exact, by sorting (Peters, Niculae and Martins, arXiv 1905.05702, section 4.1): of the m largest, with mean u and
    variance v of their halves, t is u - sqrt(1 / m - v), for the largest m whose last one is still above its t.
    """
    halves = np.asarray(logits, dtype=np.float64) / 2
    halves = halves - halves.max(axis=-1, keepdims=True)
    # What is more than 1 behind the first never has weight; so -inf needs no care of its own.
    ordered = np.maximum(-np.sort(-halves, axis=-1), -2.0)
    counts = np.arange(1, ordered.shape[-1] + 1)
    means = ordered.cumsum(axis=-1) / counts
    variances = (ordered**2).cumsum(axis=-1) / counts - means**2
    levels = means - np.sqrt(np.maximum(1 / counts - variances, 0))
    last = np.maximum((levels <= ordered).sum(axis=-1, keepdims=True), 1) - 1
    raised = np.maximum(halves - np.take_along_axis(levels, last, axis=-1), 0) ** 2
    found: NDArray[np.float64] = raised / raised.sum(axis=-1, keepdims=True)
    return found


def uniform(cosines: Sequence[object]) -> list[float]:
    """1 / k each, as in the paper."""
    return [1.0 / len(cosines)] * len(cosines)


def similarity(cosines: Sequence[float]) -> list[float]:
    """Softmax of the cosines at temperature 0.2."""
    return list(map(float, softmax(np.asarray(cosines) / SIMILARITY_TEMPERATURE)))


@dataclass(frozen=True, slots=True)
class WeightRule:
    """The numbers of the learned weightings, which hold for one pool and one encoder. c: cosine, o: wording of a hit.

    "fitted" is softmax(``fitted`` * c), "sparse" is entmax(``sparse`` * c), and "gate" is
    entmax(``gate_cosine`` * c + ``gate_words`` * o); in the last two, weights below 0.01 go to the others. A hit whose
    wording nobody knows has that which others of its cosine had: ``words_base + words_slope * c``. These two alone may
    be negative.

    Raises:
        ConfigurationError: a value that is no finite number, or a negative factor.
    """

    fitted: float
    sparse: float
    gate_cosine: float
    gate_words: float
    words_base: float
    words_slope: float

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
            if not number or (value < 0 and not name.startswith("words_")):
                raise ConfigurationError(f"{name}={value!r}: expected a finite number, and for a factor 0 or more")

    @property
    def temperature(self) -> float:
        """Of "fitted": one over its factor."""
        return 1 / self.fitted if self.fitted else float("inf")

    def as_text(self) -> str:
        """As the registry keeps it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> WeightRule:
        """From what ``as_text`` made."""
        return cls(**json.loads(text))

    def weights(self, name: str, cosines: ArrayLike, words: ArrayLike) -> NDArray[np.float64]:
        """The weights of hits by a learned weighting: (..., k), 0 or more, sum 1 along the last axis.

        Args:
            cosines: (..., k), -inf where a row has fewer hits.
            words: (..., k), NaN where nobody knows.
        """
        near = np.asarray(cosines, dtype=np.float64)
        if name == "fitted":
            return softmax(_times(self.fitted, near))
        if name == "sparse":
            return _cut(entmax(_times(self.sparse, near)))
        shared = np.asarray(words, dtype=np.float64)
        shared = np.where(np.isnan(shared), self.words_base + _times(self.words_slope, np.maximum(near, -1)), shared)
        return _cut(entmax(_times(self.gate_cosine, near) + self.gate_words * shared))


def _cut(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    kept = np.where(weights < _LEAST, 0.0, weights)
    found: NDArray[np.float64] = kept / kept.sum(axis=-1, keepdims=True)
    return found


def _times(factor: float, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 times -inf stays -inf: what is not there gets no weight from any factor."""
    return np.where(np.isneginf(values), values, factor * np.maximum(values, -2))
