"""How often the right adapter is among the first: shares with intervals, beside those that the paper reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Paper table 2, shares of the top 1, 3, 5 and 8; the retriever of 1.5 billion parameters, by the tasks it saw.
PAPER_TABLE_2: Final[Mapping[str, Mapping[int, float]]] = {
    "paper: all-MiniLM-L6-v2": {1: 0.5173, 3: 0.7311, 5: 0.8054, 8: 0.8718},
    "paper: LoraRetriever, 40 % of tasks": {1: 0.6316, 3: 0.8909, 5: 0.9545, 8: 0.9897},
    "paper: LoraRetriever, 100 % of tasks": {1: 0.7408, 3: 0.9737, 5: 0.9915, 8: 0.9982},
}
#: Groups of questions, in the order of tables: of every task, of those that the encoder was trained on, of the others.
GROUPS: Final = ("all", "seen", "unseen")


@dataclass(frozen=True, slots=True)
class Share:
    """A number and the interval around it; ``low`` and ``high`` are the number where none was asked for."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well some questions were answered.

    Attributes:
        count: how many questions.
        top: by k, the share whose own adapter was among the first k.
        mrr: mean of 1 / rank of the own adapter.
        domain: share whose first adapter was of the right domain; None where no question's task has one.
    """

    count: int
    top: Mapping[int, Share]
    mrr: Share
    domain: Share | None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers; the keys of ``top`` are texts, as JSON wants them."""
        return {
            "count": self.count,
            "top": {str(k): share.as_dict() for k, share in self.top.items()},
            "mrr": self.mrr.as_dict(),
            "domain": None if self.domain is None else self.domain.as_dict(),
        }


def accuracy(
    ranks: NDArray[np.int64],
    right_domain: NDArray[np.float64],
    ks: Sequence[int],
    resamples: int,
    seed: int,
) -> Accuracy:
    """The accuracy of questions, with 95 % percentile intervals of a bootstrap over these questions.

    The intervals tell what other questions of the same tasks would have given. Other tasks would differ by more.

    Args:
        ranks: (n,) from 1, n of 1 or more.
        right_domain: (n,) 1 or 0; NaN for a question whose task has no domain.
        resamples: 0 for no interval.
    """
    values = np.column_stack([*(ranks <= k for k in ks), 1 / ranks, right_domain]).astype(np.float64)
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, values.shape[1]))
    for row in range(resamples):
        drawn = rng.integers(len(values), size=len(values))
        draws[row] = filled[drawn].sum(0) / np.maximum(known[drawn].sum(0), 1)
    means = filled.sum(0) / np.maximum(known.sum(0), 1)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0) if resamples else (means, means)
    shares = [Share(*map(float, found)) for found in zip(means, low, high, strict=True)]
    return Accuracy(
        len(values), dict(zip(ks, shares, strict=False)), shares[-2], shares[-1] if known[:, -1].any() else None
    )


@dataclass(frozen=True, slots=True)
class Accuracies:
    """Accuracies by group of ``GROUPS``; a group without questions is left out.

    ``clean`` are of questions that stand among no task's samples, ``leaked_too`` of all questions.
    """

    clean: Mapping[str, Accuracy]
    leaked_too: Mapping[str, Accuracy]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "clean": {name: found.as_dict() for name, found in self.clean.items()},
            "leaked_too": {name: found.as_dict() for name, found in self.leaked_too.items()},
        }

    def table(self, title: str) -> str:
        """The shares in percent as a text, one group a line, with the paper's table 2 below.

        A group that has the questions of one above is left out.
        """
        rows = [(f"{title}, {name}", found) for name, found in _distinct(self.clean)]
        rows += [
            (f"{title}, {name}, with leaked", found)
            for name, found in _distinct(self.leaked_too)
            if name not in self.clean or found.count != self.clean[name].count
        ]
        ks = sorted({k for _, found in rows for k in found.top})
        lines = [["retriever", "questions", *(f"top {k}" for k in ks), "MRR", "domain"]]
        for name, found in rows:
            shares = [*(found.top.get(k) for k in ks), found.mrr, found.domain]
            lines.append([name, str(found.count), *map(_cell, shares)])
        for name, told in PAPER_TABLE_2.items():
            lines.append([name, "", *(f"{100 * told[k]:.1f}" if k in told else "-" for k in ks), "-", "-"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


@dataclass(frozen=True, slots=True)
class Mean:
    """Accuracies over several splits: each ``value`` is the mean, ``low`` and ``high`` are the least and the greatest.

    No t-interval: splits of the same tasks share questions and training tasks, so they are no independent draws.
    ``accuracies.count`` is the mean number of questions.
    """

    splits: int
    accuracies: Accuracies

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"splits": self.splits, "interval": "min and max over splits", **self.accuracies.as_dict()}

    def table(self, title: str) -> str:
        """As ``Accuracies.table``."""
        return self.accuracies.table(f"{title}, mean of {self.splits}")


class Measured(Protocol):
    """What has accuracies: an ``Evaluation``."""

    @property
    def accuracies(self) -> Accuracies:
        """Its accuracies."""


def mean_over(evaluations: Iterable[Measured]) -> Mean:
    """The mean over splits, and the least and the greatest; a group counts where a split has it.

    Raises:
        ConfigurationError: no splits, or splits measured with different ks.
    """
    splits = [evaluation.accuracies for evaluation in evaluations]
    if not splits:
        raise ConfigurationError("a mean of no evaluations was asked for; give one or more")
    if len({tuple(one.top) for split in splits for one in split.leaked_too.values()}) > 1:
        raise ConfigurationError("the evaluations were made with different ks; use the same for all")
    return Mean(
        len(splits),
        Accuracies(_mean_groups([split.clean for split in splits]), _mean_groups([s.leaked_too for s in splits])),
    )


def _mean_groups(splits: Sequence[Mapping[str, Accuracy]]) -> dict[str, Accuracy]:
    found = {name: [split[name] for split in splits if name in split] for name in GROUPS}
    return {name: _mean(accuracies) for name, accuracies in found.items() if accuracies}


def _mean(found: Sequence[Accuracy]) -> Accuracy:
    domains = [one.domain for one in found if one.domain is not None]
    return Accuracy(
        round(float(np.mean([one.count for one in found]))),
        {k: _over([one.top[k] for one in found]) for k in found[0].top},
        _over([one.mrr for one in found]),
        _over(domains) if domains else None,
    )


def _over(shares: Sequence[Share]) -> Share:
    values = [share.value for share in shares]
    return Share(float(np.mean(values)), min(values), max(values))


def _distinct(groups: Mapping[str, Accuracy]) -> list[tuple[str, Accuracy]]:
    return [(name, found) for name, found in groups.items() if name == "all" or found.count != groups["all"].count]


def _cell(share: Share | None) -> str:
    if share is None:
        return "-"
    told = f"{100 * share.value:.1f}"
    return told if share.low == share.high else f"{told} ({100 * share.low:.1f}-{100 * share.high:.1f})"
