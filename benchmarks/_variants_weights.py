"""What weights are worth: answers of real adapters under every weighting, beside each task's own adapter alone.

Retrieval is in the loop: the pool is searched with held-out test rows, and weights are learned from the samples in the
registry, which are training rows. Every distinct answer is generated once. With ``--answers FILE`` answers are kept, so
that a run that was killed goes on.

    python -m benchmarks._variants_weights --json
    python -m benchmarks._variants_weights --rows 5 --answers answers.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks._report import machine
from benchmarks._retriever_data import DATA, SAMPLES
from lora_hub_sdk import LoraHub, ModelSettings, Routing, Sampling
from lora_hub_sdk.demo.training.metrics import exact_match, word_f1
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.types import Route

ADAPTERS: Final = DATA.parent / "adapters"
BASE: Final = "smollm2-135m-instruct"
OWN: Final = "own adapter"
#: The systems that are compared, beside the task's own adapter and the base model.
SYSTEMS: Final[Mapping[str, Routing]] = {
    "selection": Routing("selection"),
    "uniform": Routing(),
    "similarity, 0.2": Routing(weights="similarity"),
    "fitted": Routing(weights="fitted"),
    "sparse": Routing(weights="sparse"),
    "gate": Routing(weights="gate"),
}
_ROWS: Final = 20
_BATCH: Final = 64
_RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out row of a task."""

    task: str
    prompt: str
    target: str
    metric: str

    def score(self, answer: str) -> float:
        """Exact match, or word-overlap F1 where the metric is none of exactness; in percent."""
        return (exact_match if self.metric == "em" else word_f1)(answer, self.target)


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """One run. ``systems``: by name, scores and what they are of the own adapter's, with 95 % intervals."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    fit: Mapping[str, Any]
    systems: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not ADAPTERS.is_dir():
        print("skipped: the adapters and their data are not beside this checkout")
        return
    report = measure(options.rows, rerank=options.rerank, k=options.k, kept=options.answers)
    print(json.dumps(asdict(report))) if options.json else show(report)


def measure(rows: int = _ROWS, *, rerank: bool = False, k: int = 3, kept: Path | None = None) -> WeightsReport:
    """Register the real adapters, learn the weights, answer ``rows`` questions of each task by every system."""
    names = sorted(folder.name for folder in ADAPTERS.iterdir() if (folder / "adapter_config.json").is_file())
    better = [name for name in names if _gained(name)]
    asked = [one for name in better for one in _asked(name, rows)]
    with TemporaryDirectory() as folder, LoraHub(f"{folder}/hub.db", index="exact", offline=True, rerank=rerank) as hub:
        for name in names:
            hub.register(ADAPTERS / name, samples=_samples(name), name=name)
        fit = hub.fit_weights(k=k)
        routes = _routes(hub, asked, k)
        answers = _answers(hub, asked, routes, kept)
    scores = {
        name: np.array([one.score(text) for one, text in zip(asked, texts, strict=True)])
        for name, texts in answers.items()
    }
    tasks = np.array([one.task for one in asked])
    systems = {name: {**figures, **_used(asked, routes[name])} for name, figures in _figures(scores, tasks).items()}
    settings = {"rows": rows, "tasks": len(better), "left out": sorted({*names} - {*better}), "k": k, "rerank": rerank}
    by_task = {task: {name: float(values[tasks == task].mean()) for name, values in scores.items()} for task in better}
    return WeightsReport(machine(), settings, fit.as_dict(), systems, by_task)


def show(report: WeightsReport) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("system", "score %", "of its own, mean of tasks", "of its own, all", "adapters", "own one's weight")
    for name, found in report.systems.items():
        of_own, of_all = (_interval(found[key]) for key in ("of_own", "of_own_all"))
        table.add_row(
            name, f"{found['score']:.1f}", of_own, of_all, f"{found['used']:.2f}", f"{found['own_weight']:.2f}"
        )
    console = Console()
    console.print(f"{report.machine}\n{report.settings}\n{report.fit['rule']}", markup=False, highlight=False)
    console.print(table)


def _gained(name: str) -> bool:
    """Whether the adapter is better than the base model, by the record of its training."""
    told = json.loads((ADAPTERS / name / "training.json").read_text("utf-8"))
    return bool(told["after"] > told["before"])


def _samples(name: str) -> list[str]:
    rows = list(dict.fromkeys(row["inputs"] for row in _rows(name, "train")))
    return random.Random(f"0 {name}").sample(rows, SAMPLES)


def _asked(name: str, count: int) -> list[Asked]:
    return [Asked(name, row["inputs"], row["targets"], row["metric"]) for row in _rows(name, "test")[:count]]


def _rows(name: str, part: str) -> list[dict[str, Any]]:
    text = (DATA / "tasks" / f"{name}.{part}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _routes(hub: LoraHub, asked: Sequence[Asked], k: int) -> dict[str, list[Route]]:
    """Each system's route for every question."""
    prompts = [one.prompt for one in asked]
    pinned = [Routing("selection", adapters=(one.task,)) for one in asked]
    found = {
        "base model": hub.route(prompts, base_model=BASE, routing=Routing("base")),
        OWN: hub.route(prompts, base_model=BASE, routing=pinned),
    }
    for name, routing in SYSTEMS.items():
        wide = Routing(routing.strategy, k, routing.weights)
        found[name] = hub.route(prompts, base_model=BASE, routing=wide)
    return found


def _answers(
    hub: LoraHub, asked: Sequence[Asked], routes: Mapping[str, Sequence[Route]], kept: Path | None
) -> dict[str, list[str]]:
    """Each system's answers; equal routes of one question are answered once."""
    known: dict[str, str] = json.loads(kept.read_text("utf-8")) if kept is not None and kept.is_file() else {}
    todo: dict[str, Request] = {}
    for found in routes.values():
        for one, route in zip(asked, found, strict=True):
            key = _key(one, route)
            if key not in known:
                todo.setdefault(key, Request(one.prompt, route, Sampling(_longest(one))))
    engine, start = hub.engine(BASE, ModelSettings("bfloat16")), perf_counter()
    # Mixed, so that long answers are not all in the last batches and a neighbour's noise hits all systems.
    keys = random.Random(0).sample(sorted(todo), len(todo))
    for at in range(0, len(keys), 4 * _BATCH):
        part = keys[at : at + 4 * _BATCH]
        known.update(zip(part, (done.text for done in engine.generate([todo[key] for key in part])), strict=True))
        if kept is not None:
            kept.write_text(json.dumps(known), "utf-8")
        print(f"{at + len(part)} of {len(keys)} answers, {perf_counter() - start:.0f} s", file=sys.stderr)
    return {
        name: [known[_key(one, route)] for one, route in zip(asked, found, strict=True)]
        for name, found in routes.items()
    }


def _longest(one: Asked) -> int:
    return 16 if one.metric == "em" else 64


def _key(one: Asked, route: Route) -> str:
    members = ", ".join(f"{weight:.4f} {name}" for name, weight in _members(route).items())
    return f"{one.task}: {one.prompt} | {members}"


def _members(route: Route) -> dict[str, float]:
    return {member.adapter.name: member.weight for member in route.members}


def _used(asked: Sequence[Asked], routes: Sequence[Route]) -> dict[str, float]:
    """Adapters in a route, and the weight of the question's own one among them; means."""
    return {
        "used": float(np.mean([len(route.members) for route in routes])),
        "own_weight": float(np.mean([_members(r).get(one.task, 0.0) for one, r in zip(asked, routes, strict=True)])),
    }


def _figures(scores: Mapping[str, NDArray[np.float64]], tasks: NDArray[np.str_]) -> dict[str, dict[str, Any]]:
    """Of each system the mean score over tasks, and what it is of the own adapter's.

    ``of_own`` is the mean over tasks of the ratio of the two, ``of_own_all`` the ratio of their means over tasks.
    Intervals of 95 % by resampling the questions of each task, the same for both.
    """
    rng = np.random.default_rng(0)
    places = [np.flatnonzero(tasks == task) for task in dict.fromkeys(tasks)]
    draws = [rng.choice(at, (_RESAMPLES, len(at))) for at in places]
    found: dict[str, dict[str, Any]] = {}
    own, own_drawn = _by_task(scores[OWN], places, draws)
    for name, values in scores.items():
        mine, mine_drawn = _by_task(values, places, draws)
        # A draw in which the own adapter has nothing right tells nothing of the ratio of its task.
        ratios = np.where(own_drawn > 0, mine_drawn / np.where(own_drawn > 0, own_drawn, 1.0), np.nan)
        found[name] = {
            "score": float(mine.mean()),
            "of_own": _share(float((mine / own).mean()), np.nanmean(ratios, axis=1)),
            "of_own_all": _share(float(mine.mean() / own.mean()), mine_drawn.mean(axis=1) / own_drawn.mean(axis=1)),
        }
    return found


def _by_task(
    values: NDArray[np.float64], places: Sequence[NDArray[np.int64]], draws: Sequence[NDArray[np.int64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means (tasks,), and those of every draw (draws, tasks)."""
    means = np.array([values[at].mean() for at in places])
    return means, np.stack([values[drawn].mean(axis=1) for drawn in draws], axis=1)


def _share(value: float, draws: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def _interval(share: Mapping[str, float]) -> str:
    return f"{share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._variants_weights", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rows", type=int, default=_ROWS, help="held-out questions of each task")
    parser.add_argument("--rerank", action="store_true", help="search by words too")
    parser.add_argument("-k", type=int, default=3, help="adapters of a mixture")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="keep answers here, and go on from them")
    return parser


if __name__ == "__main__":
    main()
