"""When nothing fits: how well a bound tells prompts of known tasks from prompts whose adapter is not there.

Each question is asked three times: of the whole pool, of the pool without its adapter (siblings of its domain stay, and
are hard to tell from it), and without its whole domain. What sets the bound sees the adapters' samples alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks._retriever_data import Material
from benchmarks._retriever_effort import Effort
from benchmarks._retriever_lab import Lab, Matrix
from benchmarks._retriever_score import Row, Table
from benchmarks._retriever_tables import FRACTION, Run, trained_runs, untrained_run
from lora_hub_sdk.retriever.calibration import calibrate
from lora_hub_sdk.retriever.encoder import mean_vector
from lora_hub_sdk.retriever.fitting import wording
from lora_hub_sdk.retriever.lexicon import grams, profile
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.reranker import CANDIDATES
from lora_hub_sdk.retriever.tasks import Task

_SHARE: Final = 0.05
Values = NDArray[np.float64]
#: The cosines of one prompt with the adapters that are there, the nearest first, and the wording of the first 50.
Statistic = Callable[[Values, Values], float]


def abstain(lab: Lab, materials: Sequence[Material], effort: Effort) -> list[Table]:
    """Untrained encoders and those trained on 40 %, each by several statistics, and by the calibrated bounds."""
    compared: list[Row] = []
    bounded: list[Row] = []
    for material in materials:
        runs = {"untrained": untrained_run(lab), "trained": trained_runs(lab, material, FRACTION, range(1))}
        for name, several in runs.items():
            for encoder, seen in several:
                found = _measured((encoder, seen), material)
                which = {"tasks": material.name, "encoder": name}
                compared += [{**which, **row} for row in found["statistics"]]
                bounded += [{**which, **row} for row in found["calibrated"]]
    return [
        Table(
            "When nothing fits: prompts that are let through although their adapter is away, in %",
            compared,
            f"at the bound that gives {_SHARE:.0%} of the questions away; AUROC of telling them apart",
        ),
        Table("When nothing fits: bounds from the samples, checked by the questions, in %", bounded),
    ]


def measure(
    tasks: Sequence[Task],
    questions: Sequence[Question],
    vectors: Mapping[str, Matrix],
    prompts: Matrix,
    *,
    trained: Collection[str] = (),
) -> dict[str, list[Row]]:
    """``statistics``: what each could do; ``calibrated``: what the bounds of ``calibrate`` do.

    Args:
        vectors: for each task those of its inputs, (n, d), of length 1.
        prompts: those of the questions, (q, d), of length 1.
        trained: names of tasks whose samples set no bound.
    """
    means = np.stack([mean_vector(vectors[task.name]) for task in tasks]).astype(np.float64)
    profiles = [profile(task.inputs) for task in tasks]
    names = [task.name for task in tasks]
    domains = np.array([task.domain or task.name for task in tasks])
    bounds = {share: calibrate(tasks, vectors, false_abstain=share, trained=trained) for share in (0.01, _SHARE, 0.1)}
    rule = bounds[_SHARE].rule
    statistics: dict[str, Statistic] = {
        "cosine": lambda cosines, shared: float(cosines[0]),
        "standard score": lambda cosines, shared: float((cosines[0] - cosines.mean()) / cosines.std()),
        "margin to the second": lambda cosines, shared: float(cosines[0] - cosines[1]),
        "words": lambda cosines, shared: float(shared.max()),
        f"words + {rule.weight:g} cosine": lambda cosines, shared: _fit(cosines, shared, rule.weight),
    }
    # (questions, 3 pools, statistics), and the fit by each bound's own weight.
    values = np.empty((len(questions), 3, len(statistics)))
    fits = np.empty((len(questions), 3, len(bounds)))
    for row, asked in enumerate(questions):
        gold = names.index(asked.task)
        prompt, everything = grams(asked.text), means @ prompts[row].astype(np.float64)
        others = np.arange(len(tasks)) != gold
        for pool, there in enumerate((np.ones_like(others), others, domains != domains[gold])):
            places = np.flatnonzero(there)
            places = places[np.argsort(-everything[places], kind="stable")]
            shared = np.nan_to_num(wording(prompt, [profiles[place] for place in places[:CANDIDATES]]))
            cosines = everything[places]
            values[row, pool] = [statistic(cosines, shared) for statistic in statistics.values()]
            fits[row, pool] = [_fit(cosines, shared, one.rule.weight) for one in bounds.values()]
    return {
        "statistics": [{"statistic": name, **_told(values[:, :, place])} for place, name in enumerate(statistics)],
        "calibrated": [
            {"bound": name, "wanted": 100 * share, **_errs(scores, least), "expected": 100 * (rates.false_route or 0.0)}
            for place, (share, one) in enumerate(bounds.items())
            for name, scores, least, rates in (
                ("cosine", values[:, :, 0], one.min_score, one.by_cosine),
                ("words and cosine", fits[:, :, place], one.rule.min_fit, one.by_rule),
            )
        ],
    }


def _measured(run: Run, material: Material) -> dict[str, list[Row]]:
    encoder, seen = run
    vectors = {task.name: encoder.encode(task.inputs) for task in material.tasks}
    questions = material.clean
    return measure(
        material.tasks, questions, vectors, encoder.encode([asked.text for asked in questions]), trained=seen
    )


def _fit(cosines: Values, shared: Values, weight: float) -> float:
    return float(np.max(shared + weight * cosines[: len(shared)]))


def _told(values: Values) -> Row:
    """Of (questions, 3 pools) values: how well the first column is told from the others."""
    own, strange, far = values.T
    bound = float(np.quantile(own, _SHARE, method="lower"))
    return {
        "AUROC, adapter away": _auroc(own, strange),
        "AUROC, domain away": _auroc(own, far),
        "let through, adapter away": 100 * float(np.mean(strange >= bound)),
        "let through, domain away": 100 * float(np.mean(far >= bound)),
    }


def _errs(values: Values, bound: float) -> Row:
    own, strange, far = values.T
    return {
        "given away": 100 * float(np.mean(own < bound)),
        "let through, adapter away": 100 * float(np.mean(strange >= bound)),
        "let through, domain away": 100 * float(np.mean(far >= bound)),
    }


def _auroc(above: Values, below: Values) -> float:
    """The share of pairs in the right order; equal ones count half."""
    ordered = np.sort(below)
    lower = np.searchsorted(ordered, above, side="left")
    equal = np.searchsorted(ordered, above, side="right") - lower
    return float(np.mean((lower + equal / 2) / len(below)))
