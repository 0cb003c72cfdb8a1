"""Which strategy to use, on the zoo: pools that grow, adapters that contradict each other, near-duplicates, speed.

    python -m benchmarks.strategies --output FOLDER
    python -m benchmarks.strategies --output FOLDER --part growth --rows 20 --json | jq .quality

Each part is one line of JSON or one table. A part that was killed goes on where it was, in its own folder below FOLDER.
The adapter of "conflict" that contradicts sst2 is trained first, which takes some minutes; with "throughput",
FOLDER is where ``draw_figures`` looks for it. All needs adapters that are not part of this project.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks import zoo
from benchmarks._report import machine
from benchmarks._zoo import ADAPTERS, TASKS, register_zoo, zoo_folders, zoo_questions, zoo_training
from lora_hub_sdk import LoraHub, ModelSettings
from lora_hub_sdk.demo.training.recipes import Recipe
from lora_hub_sdk.evaluation.conflicts import study_conflict
from lora_hub_sdk.evaluation.duplicates import study_duplicates
from lora_hub_sdk.evaluation.figures import SCORE
from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet, read_mixed
from lora_hub_sdk.evaluation.near_duplicates import near_duplicates, write_noisy
from lora_hub_sdk.evaluation.pool_growth import SIZES, grow_pool
from lora_hub_sdk.evaluation.throughput import BATCHES, measure_throughput
from lora_hub_sdk.retriever.figures import curve_figure

#: The task whose labels are exchanged, and what for what.
CONFLICT: Final = "sst2"
EXCHANGED: Final = {"positive": "negative", "negative": "positive"}
#: Of different domains and metrics; each is copied with each share of noise.
COPIED: Final = ("sst2", "trec", "tatoeba_enfr")
SHARES: Final = (0.01, 0.01, 0.1)
#: Rows that a copy and a contradicting adapter are told by are another draw than the original's.
_OTHER_DRAW: Final = 100


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts share."""

    options: argparse.Namespace

    @contextmanager
    def ground(self, part: str) -> Iterator[Ground]:
        """The zoo in a hub of its own, which further adapters may join."""
        with TemporaryDirectory() as folder, LoraHub(f"{folder}/hub.db", index="exact", offline=True) as hub:
            own = register_zoo(hub, self.options.adapters, progress=not self.options.json)
            yield Ground(
                hub=hub,
                base_model=zoo.BASE,
                own=own,
                folder=self.output / part / "learned",
                seed=self.options.seed,
                settings=ModelSettings(self.options.dtype),
                progress=not self.options.json,
            )

    @property
    def output(self) -> Path:
        folder: Path = self.options.output
        return folder

    def questions(self, tasks: Sequence[str]) -> MixedSet:
        chosen = [task for task in tasks if not self.options.task or task in self.options.task]
        return zoo_questions(chosen, self.options.rows, self.options.seed)


def growth(bench: Bench) -> dict[str, Any]:
    """Quality as the pool grows."""
    with bench.ground("growth") as ground:
        asked = bench.questions(list(ground.own))
        found = grow_pool(ground, asked, output=bench.output / "growth", sizes=bench.options.sizes)
    curve_figure(
        found.curves,
        bench.output / "growth" / "pool_growth",
        title="Quality by the size of the pool",
        x_label="adapters in the pool",
        y_label=SCORE,
        log_x=True,
    )
    return found.as_dict()


def conflict(bench: Bench) -> dict[str, Any]:
    """An adapter that was taught the exchanged labels, beside the original."""
    opposite = f"{CONFLICT}-opposite"
    steps = bench.options.steps or _told()["steps"]
    kept = bench.output / "conflict" / f"{steps}-steps"
    with redirect_stdout(sys.stderr):  # where only reports belong
        trained = train_opposite(kept, steps)
    with bench.ground("conflict") as ground:
        samples = [row.inputs for row in zoo_training([CONFLICT], seed=_OTHER_DRAW).rows]
        ground.hub.register(trained, name=opposite, samples=samples)
        found = study_conflict(
            ground,
            zoo_questions([CONFLICT], bench.options.rows, bench.options.seed),
            first=CONFLICT,
            second=opposite,
            exchanged=EXCHANGED,
            output=kept / "run",
        )
    return {"systems": {name: outcome.as_dict() for name, outcome in found.items()}}


def duplicates(bench: Bench) -> dict[str, Any]:
    """Copies with noise of some adapters in the pool."""
    with bench.ground("duplicates") as ground:
        copies: dict[str, str] = {}
        for task in COPIED:
            for number, share in enumerate(SHARES, start=1):
                name = f"{task}-copy-{number}"
                target = bench.output / "duplicates" / "copies" / name
                folder = write_noisy(zoo_folders(bench.options.adapters)[task], target, share=share, seed=number)
                samples = [row.inputs for row in zoo_training([task], seed=_OTHER_DRAW + number).rows]
                ground.hub.register(folder, name=name, samples=samples)
                copies[name] = task
        pool = list(ground.pool().values())
        found = study_duplicates(
            ground, bench.questions(list(ground.own)), copies=copies, output=bench.output / "duplicates" / "run"
        )
        pairs = near_duplicates(pool, above=0.5)
    return {
        "copies": {task: list(SHARES) for task in COPIED},
        "near_duplicates": [asdict(pair) for pair in pairs],
        "groups": {group: {name: one.as_dict() for name, one in systems.items()} for group, systems in found.items()},
    }


def throughput(bench: Bench) -> dict[str, Any]:
    """Tokens per second against the batch."""
    with bench.ground("throughput") as ground:
        found = measure_throughput(
            ground,
            bench.questions(list(ground.own)),
            batches=bench.options.batches,
            new_tokens=bench.options.new_tokens,
            rounds=bench.options.rounds,
        )
    found.save(bench.output)
    return found.as_dict()


PARTS: Final[Mapping[str, Callable[[Bench], dict[str, Any]]]] = {
    "growth": growth,
    "conflict": conflict,
    "duplicates": duplicates,
    "throughput": throughput,
}


def train_opposite(folder: Path, steps: int) -> Path:
    """Train the task's adapter once more, on its training rows with their labels exchanged; returns its folder.

    Turning the sign of the original's factors would not do: that takes back what it learned, the form of an answer too,
    and what comes is no label at all. The mean of the two would be the base model.
    """
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in opposite_rows())
    (data / f"{CONFLICT}.train.jsonl").write_text("".join(lines), "utf-8")
    told = _told()
    recipe = Recipe(told["r"], told["lora_alpha"], tuple(told["target_modules"]), steps)
    learner = zoo.new_learner(zoo.BASE, "auto")
    return zoo.train_task(CONFLICT, zoo.Training(learner, recipe, data, folder / "adapter"))


def opposite_rows() -> list[MixedRow]:
    """The task's training rows, each with the other label."""
    return [replace(row, targets=EXCHANGED[row.targets]) for row in read_mixed(TASKS / f"{CONFLICT}.train.jsonl").rows]


def _told() -> dict[str, Any]:
    """How the original was trained."""
    told: dict[str, Any] = json.loads((ADAPTERS / CONFLICT / "training.json").read_text("utf-8"))
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not ADAPTERS.is_dir():
        print("skipped: the adapters and their data are not beside this checkout")
        return
    bench = Bench(options)
    for part in options.part or PARTS:
        found = {"part": part, "machine": machine(), "settings": _settings(options), **PARTS[part](bench)}
        if options.json:
            print(json.dumps(found), flush=True)
        else:
            show(part, found)


def show(part: str, found: Mapping[str, Any]) -> None:
    """Print a part's tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{part}: {found['machine']}\n{found['settings']}", markup=False, highlight=False)
    for title, rows in _tables(part, found).items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = Table(title, *columns)
        for name, row in rows.items():
            table.add_row(name, *(_cell(row.get(column)) for column in columns))
        console.print(table)


def _tables(part: str, found: Mapping[str, Any]) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    if part == "growth":
        others: dict[str, Mapping[str, Any]] = {
            "perfect": dict.fromkeys(found["own_first"], found["perfect"]),
            "own adapter first": found["own_first"],
        }
        return {"adapters in the pool": {**found["quality"], **others}}
    if part == "conflict":
        return {"system": found["systems"]}
    if part == "duplicates":
        pairs = {f"{one['first']}, {one['second']}": {"cosine": one["cosine"]} for one in found["near_duplicates"]}
        return {**found["groups"], "near-duplicates": pairs}
    rows: dict[str, dict[str, Any]] = {}
    for one in found["speeds"]:
        cell = {"value": one["tokens_per_s"], "low": None, "high": None, "of": one["of_single"]}
        rows.setdefault(one["system"], {})[str(one["batch"])] = cell
    return {"tokens/s (of single)": rows}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return f"{value:.3f}"
    if "of" in value:
        return f"{value['value']:.1f} ({value['of']:.2f})"
    if value["value"] is None:
        return ""
    bounds = "" if value["low"] is None or value["high"] is None else f" ({value['low']:.1f} to {value['high']:.1f})"
    return f"{value['value']:.1f}{bounds}"


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rows", "seed", "dtype", "sizes", "batches", "new_tokens", "rounds", "task")
    return {name: getattr(options, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.strategies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON for each part instead of tables")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="answers are kept here")
    parser.add_argument("--part", choices=[*PARTS], action="append", help="only this one; may be repeated")
    parser.add_argument("--rows", type=int, default=20, help="held-out questions of each task")
    parser.add_argument("--task", action="append", help="only questions of this one; may be repeated")
    parser.add_argument(
        "--adapters", type=Path, action="append", default=[], metavar="FOLDER", help="with more adapters"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="growth: adapters in the pool")
    parser.add_argument("--steps", type=int, default=0, help="conflict: of the training; as the original's if 0")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="throughput: rows at once")
    parser.add_argument("--new-tokens", type=int, default=32, help="throughput: of every answer")
    parser.add_argument("--rounds", type=int, default=5, help="throughput: measured rounds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
