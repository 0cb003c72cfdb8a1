"""Figures of an evaluation: each a PNG, and beside it the very numbers that were drawn, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

    from lora_hub_sdk.retriever.evaluation import Evaluation

#: Names of more tasks than this cannot be read beside each other, and are left to the data file.
_MAX_LABELS: Final = 120
_MARKERS: Final = "osD^vPX*"


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a figure: ``y`` over ``x``, with a band from ``low`` to ``high`` where both are given."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def similarity_figure(evaluation: Evaluation, target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Cosine between the adapters' vectors, those of one domain side by side (paper figure 3).

    Args:
        target: where the files go, without a suffix; folders are made.

    Returns:
        The PNG and the JSON file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigurationError: the files cannot be written.
    """
    figure = new_figure(*_square(len(evaluation.tasks)))
    order = _by_domain(evaluation)
    names = [evaluation.tasks[place].name for place in order]
    domains = [evaluation.tasks[place].domain for place in order]
    values = evaluation.similarity[np.ix_(order, order)]
    axes = figure.add_subplot()
    _matrix(figure, axes, values, names, "cosine", "viridis")
    _frames(axes, domains)
    axes.set_title(f"Similarity of tasks, {evaluation.encoder}")
    data = {"encoder": evaluation.encoder, "tasks": names, "domains": domains, "cosine": _rounded(values)}
    return write_figure(figure, data, target)


def confusion_figure(evaluation: Evaluation, target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Which adapter came first (column) for the clean questions of each task (row), in percent of the row.

    Arguments, result and errors are as of ``similarity_figure``. The data file holds the counts.
    """
    figure = new_figure(*_square(len(evaluation.tasks)))
    order = _by_domain(evaluation)
    names = [evaluation.tasks[place].name for place in order]
    domains = [evaluation.tasks[place].domain for place in order]
    counts = evaluation.confusion[np.ix_(order, order)]
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes = figure.add_subplot()
    _matrix(figure, axes, percent, names, "% of the task's questions", "Blues", limits=(0, 100))
    _frames(axes, domains)
    for row, column in zip(*percent.nonzero(), strict=True):
        if len(names) <= _MAX_LABELS:
            shade = "white" if percent[row, column] > 60 else "black"
            label = f"{percent[row, column]:.0f}"
            axes.text(column, row, label, ha="center", va="center", fontsize=5, color=shade)
    axes.set(
        title=f"First adapter for each task's questions, {evaluation.encoder}",
        xlabel="adapter that came first",
        ylabel="task of the question",
    )
    data = {"encoder": evaluation.encoder, "tasks": names, "domains": domains, "count": counts.tolist()}
    return write_figure(figure, data, target)


def curve_figure(
    curves: Iterable[Curve],
    target: str | os.PathLike[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> tuple[Path, Path]:
    """Lines with bands, for example accuracy over the share of tasks trained on, or over the size of the pool.

    Args:
        log_x: give each doubling of x the same width.

    Further arguments, result and errors are as of ``similarity_figure``.

    Raises:
        ConfigurationError: no curve, or one whose parts are of different lengths.
    """
    drawn = list(curves)
    if not drawn:
        raise ConfigurationError("a figure without curves was asked for; give one or more")
    for curve in drawn:
        if len({len(part) for part in (curve.x, curve.y, curve.low, curve.high) if part is not None}) > 1:
            raise ConfigurationError(f"curve {curve.name!r}: x, y, low and high differ in length")
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for number, curve in enumerate(drawn):
        marker = _MARKERS[number % len(_MARKERS)]
        (line,) = axes.plot(_floats(curve.x), _floats(curve.y), marker=marker, markersize=4, label=curve.name)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(
                _floats(curve.x), _floats(curve.low), _floats(curve.high), alpha=0.18, color=line.get_color()
            )
    if log_x:
        axes.set_xscale("log")
        ticks = sorted({float(x) for curve in drawn for x in curve.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    data = {"title": title, "x": x_label, "y": y_label, "log_x": log_x, "curves": [asdict(curve) for curve in drawn]}
    return write_figure(figure, data, target)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches: pyplot would keep it for ever and is not for threads.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("drawing figures", "plots") from error
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Figure, data: dict[str, Any], target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure and its numbers; arguments, result and errors are as of ``similarity_figure``."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if isinstance(text, Text):
            text.set_parse_math(False)  # a name may hold dollar signs, which would be taken for a formula
    stem = Path(target)
    image, numbers = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.json")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(image, format="png", dpi=150)
        numbers.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise ConfigurationError(f"the figure {os.fspath(image)!r} cannot be written: {error}") from error
    return image, numbers


def _square(tasks: int) -> tuple[float, float]:
    side = min(24.0, 3.5 + 0.19 * tasks)
    return side + 1, side


def _by_domain(evaluation: Evaluation) -> list[int]:
    """Places of the tasks by domain and then name, those without a domain last."""
    tasks = evaluation.tasks
    return sorted(
        range(len(tasks)), key=lambda place: (tasks[place].domain is None, tasks[place].domain, tasks[place].name)
    )


def _matrix(
    figure: Figure,
    axes: Axes,
    values: NDArray[Any],
    names: Sequence[str],
    label: str,
    colours: str,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    figure.colorbar(image, ax=axes, label=label, fraction=0.04, pad=0.02)
    if len(names) <= _MAX_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="task", ylabel="task")


def _frames(axes: Axes, domains: Sequence[str | None]) -> None:
    """A frame around each domain's block on the diagonal, its name beside it."""
    from matplotlib.patches import Rectangle

    start = 0
    for domain, members in groupby(domains):
        size = len(list(members))
        if domain is not None:
            axes.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, fill=False, edgecolor="red", linewidth=1))
            left = start + size / 2 > len(domains) / 2
            axes.text(
                start - 0.8 if left else start + size - 0.2,
                start + (size - 1) / 2,
                domain,
                ha="right" if left else "left",
                va="center",
                fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
            )
        start += size


def _rounded(values: NDArray[Any]) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in values]


def _floats(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
