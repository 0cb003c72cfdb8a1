"""The two scores that the demo tasks use, both in percent and both free of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

MetricName = Literal["em", "f1"]


def exact_match(prediction: str, target: str) -> float:
    """Return 100.0 if both texts are equal after stripping outer whitespace, else 0.0."""
    return 100.0 if prediction.strip() == target.strip() else 0.0


def word_f1(prediction: str, target: str) -> float:
    """Return the F1 overlap of the lower-cased whitespace tokens, in percent.

    Tokens are counted as a multiset. Two empty texts agree fully; one empty text scores 0.
    """
    predicted = Counter(prediction.lower().split())
    wanted = Counter(target.lower().split())
    if not predicted or not wanted:
        return 100.0 if predicted == wanted else 0.0
    common = (predicted & wanted).total()
    return 200.0 * common / (predicted.total() + wanted.total())


METRICS: Mapping[MetricName, Callable[[str, str], float]] = MappingProxyType({"em": exact_match, "f1": word_f1})


def mean_score(metric: MetricName, predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Return the mean of ``metric`` over aligned predictions and targets, in percent.

    Raises:
        ValueError: the two sequences differ in length or are empty.
    """
    if not targets:
        raise ValueError("a score needs at least one row")
    score = METRICS[metric]
    return sum(score(p, t) for p, t in zip(predictions, targets, strict=True)) / len(targets)
