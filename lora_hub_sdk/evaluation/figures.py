"""The figures of a run: each a PNG, and beside it the very numbers that were drawn, as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.evaluation import throughput
from lora_hub_sdk.evaluation.curves import quality_curves
from lora_hub_sdk.evaluation.groups import TITLES, Group
from lora_hub_sdk.evaluation.report import Report, make_report
from lora_hub_sdk.evaluation.results import Results
from lora_hub_sdk.evaluation.throughput import Throughput
from lora_hub_sdk.retriever.figures import Curve, curve_figure, new_figure, similarity_figure, write_figure
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.tasks import tasks_of

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground

#: Where they go within a run's folder.
FOLDER: Final = "figures"
SCORE: Final = "score, mean over tasks, %"
_COLOURS: Final[Mapping[Group, str]] = {
    "reference": "#b0b0b0",
    "seen": "#5b9bd5",
    "learned": "#9a7fc4",
    "unseen": "#e2a45a",
}


def draw_figures(output: str | os.PathLike[str], *, ground: Ground | None = None) -> list[Path]:
    """Draw what a run's folder has the numbers for, into ``<output>/figures``.

    - ``systems``: the table's systems, each with its mean over tasks and its interval.
    - ``quality_by_k`` (paper figure 4a): where ``curve_systems`` were asked.
    - ``throughput`` (paper figure 4b): where ``measure_throughput`` was saved into the folder.
    - ``similarity`` (paper figure 3): where a ground is given, for the samples of its adapters.

    Returns:
        The files, each PNG before its JSON.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigurationError: the folder is not that of a run, or the files cannot be written.
    """
    results = Results.read(output)
    folder = Path(output) / FOLDER
    files: list[Path] = []
    if results.record.listed:
        files += systems_figure(make_report(results), folder / "systems")
    if curves := quality_curves(results.answers):
        files += k_figure(curves, folder / "quality_by_k")
    if (results.folder / throughput.FILE).is_file():
        files += throughput_figure(Throughput.load(results.folder), folder / "throughput")
    if ground is not None:
        # Vectors that their owners gave have no samples to make them from again.
        with suppress(SamplesError):
            files += pool_figure(ground, folder / "similarity", domains=results.questions.domains)
    return files


def systems_figure(report: Report, target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A bar for each system of the table, with its interval where that is known, coloured by group.

    Arguments, result and errors are as of ``retriever.figures.similarity_figure``.
    """
    from matplotlib.patches import Patch

    drawn = [one for one in report.systems if not math.isnan(one.overall.value)]
    figure = new_figure(7, 1.6 + 0.28 * len(drawn))
    axes = figure.add_subplot()
    names, values = [one.name for one in drawn], [one.overall.value for one in drawn]
    axes.barh(names, values, color=[_COLOURS[one.group] for one in drawn])
    for place, one in enumerate(drawn):
        if one.overall.is_known:
            bounds = [one.overall.low, one.overall.high]
            axes.plot(bounds, [place, place], color="black", linewidth=1.2, marker="|", markersize=6)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    title = f"{report.questions} questions of {len(report.domains)} tasks, {report.about.get('base model', '')}"
    axes.set(title=title, xlabel=SCORE)
    axes.grid(alpha=0.3, axis="x")
    groups = [group for group in _COLOURS if any(one.group == group for one in drawn)]
    figure.legend(
        handles=[Patch(color=_COLOURS[group], label=TITLES[group]) for group in groups],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    systems = {one.name: {"group": one.group, **one.overall.as_dict()} for one in drawn}
    return write_figure(figure, {"title": title, "x": SCORE, "systems": systems}, target)


def k_figure(curves: Sequence[Curve], target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Quality against k (paper figure 4a); arguments, result and errors are as of ``curve_figure``."""
    title = "Quality by the number of adapters"
    return curve_figure(curves, target, title=title, x_label="adapters (k)", y_label=SCORE)


def throughput_figure(found: Throughput, target: str | os.PathLike[str]) -> tuple[Path, Path]:
    """New tokens per second against the batch (paper figure 4b).

    Arguments, result and errors are as of ``curve_figure``.
    """
    told = found.settings
    return curve_figure(
        [
            Curve(name, [one.batch for one in own], [one.tokens_per_s for one in own])
            for name in dict.fromkeys(speed.system for speed in found.speeds)
            for own in [[speed for speed in found.speeds if speed.system == name]]
        ],
        target,
        title=f"Throughput, {told.get('base_model')}, {told.get('dtype')} on {told.get('device')}",
        x_label="rows answered together",
        y_label="new tokens per second",
        log_x=True,
    )


def pool_figure(
    ground: Ground, target: str | os.PathLike[str], *, domains: Mapping[str, str] | None = None
) -> tuple[Path, Path]:
    """Cosines between the pool's adapters by domain (paper figure 3): those whose samples were kept.

    Args:
        domains: by task, for adapters without a tag "domain:...": that of the task whose own adapter they are.

    Raises:
        SamplesError: no adapter of the pool has samples that were kept.
        As ``similarity_figure``.
    """
    known = {name: (domains or {}).get(task) for task, name in ground.own.items()}
    pool = ground.pool()
    tasks = [
        task if task.domain else replace(task, domain=known.get(task.name))
        for task in tasks_of(ground.hub, ground.namespace)
        if task.name in pool
    ]
    if not tasks:
        raise SamplesError(ground.namespace, "no adapter of the pool has samples that were kept")
    # Only its vectors are drawn; an evaluation wants a question.
    asked = [Question(tasks[0].inputs[0], tasks[0].name)]
    return similarity_figure(ground.hub.evaluate_retriever(asked, tasks=tasks), target)
