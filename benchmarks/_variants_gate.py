"""What a RAMoLE gate is worth on adapters that it never saw: real tasks, retrieval among all adapters, test rows.

A gate is trained on a share of the adapters with their tasks' train rows. Then test rows of the other adapters' tasks,
and of the trained ones', are answered by the base model, by each task's own adapter, and by the three retrieved ones
mixed in several ways. Scores are in percent: exact match, or the F1 of words where a task asks for longer texts. Losses
are -log p of the right answers' tokens, each row's mean.

    python -m benchmarks._variants_gate --gate gate.safetensors
    python -m benchmarks._variants_gate --gate gate.safetensors --json | jq .ratios
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks._report import Report, machine
from lora_hub_sdk.composition.ramole import Ramole
from lora_hub_sdk.demo.training.metrics import exact_match, word_f1
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.types import Routing, Sampling

if TYPE_CHECKING:
    from numpy.typing import NDArray


_SHARED: Final = Path(__file__).resolve().parents[2] / "shared"
_BASE: Final = "smollm2-135m-instruct"
#: How many of a task's first train rows are the adapter's samples; a gate is trained on others.
_SAMPLES: Final = 20
_K: Final = 3
_RESAMPLES: Final = 2000
_METRICS: Final[Mapping[str, Callable[[str, str], float]]] = {"em": exact_match, "rouge": word_f1, "bleu": word_f1}
_OWN: Final = "own adapter"
#: Of mean scores, first over second.
_RATIOS: Final = (
    ("uniform", _OWN),
    ("similarity", _OWN),
    ("ramole", _OWN),
    ("ramole", "uniform"),
    ("ramole", "similarity"),
)


@dataclass(frozen=True, slots=True)
class TestRow:
    """A question that was in no training, and its task, which is its adapter's name."""

    task: str
    inputs: str
    targets: str
    metric: str


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
        for report in gate_quality(options, Path(temporary)):
            if options.json:
                print(report.as_json(), flush=True)
            else:
                report.show()


def gate_quality(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    """Train a gate, or take the one that is there, and compare it; nothing where the real adapters are absent."""
    if not (options.shared / "adapters").is_dir():
        return
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.gate_training import GateTrainer

    settings = ModelSettings(options.dtype)
    with LoraHub(folder / "hub.db", index="exact", offline=True) as hub:
        tasks = _register(hub, options.shared)
        if options.gate is None or not options.gate.exists():
            trainer = GateTrainer(
                width=options.width,
                seed=options.seed,
                steps=options.steps,
                batch=options.batch,
                k=_K,
                max_tokens=options.max_tokens,
                settings=settings,
                progress=not options.json,
            )
            options.gate = options.gate or folder / "gate.safetensors"
            trainer.fit(
                hub, base_model=_BASE, output=options.gate, fraction=options.fraction, rows=_training(options, tasks)
            )
        gate = hub.use_gate(options.gate)
        assert isinstance(gate, Ramole)
        groups = {"unseen": gate.training["unseen"], "trained": sorted(gate.trained)}
        for group in options.tasks.split("+"):
            rows = [
                TestRow(task, row["inputs"], row["targets"], row["metric"])
                for task in groups[group]
                for row in _rows(options.shared, task, "test")[: options.test_rows]
            ]
            scores = {
                name: _answered(hub, rows, routings, settings, options.new_tokens)
                for name, routings in _routings(rows).items()
            }
            yield _report(options, gate, group, rows, scores, _losses(hub, gate, rows, settings))


def _training(options: argparse.Namespace, tasks: Sequence[str]) -> list[dict[str, str]]:
    """Rows of every task; those of adapters that are not drawn are left out by the trainer."""
    return [
        {"inputs": row["inputs"], "targets": row["targets"], "adapter": task}
        for task in tasks
        for row in _rows(options.shared, task, "train")[_SAMPLES : _SAMPLES + options.train_rows]
    ]


def _routings(rows: Sequence[TestRow]) -> dict[str, list[Routing]]:
    alike = {
        "base": Routing("base"),
        "uniform": Routing("mixture", _K),
        "similarity": Routing("mixture", _K, "similarity"),
        "ramole": Routing("ramole", _K),
    }
    own = {_OWN: [Routing("selection", adapters=(row.task,)) for row in rows]}
    return own | {name: [routing] * len(rows) for name, routing in alike.items()}


def _answered(
    hub: LoraHub, rows: Sequence[TestRow], routings: Sequence[Routing], settings: Any, new_tokens: int
) -> NDArray[np.float64]:
    """Each row's score."""
    completions = hub.generate(
        [row.inputs for row in rows],
        base_model=_BASE,
        routing=routings,
        sampling=Sampling(new_tokens),
        settings=settings,
    )
    return np.array(
        [_METRICS[row.metric](completion.text, row.targets) for row, completion in zip(rows, completions, strict=True)]
    )


def _losses(
    hub: LoraHub, gate: Ramole, rows: Sequence[TestRow], settings: Any, batch: int = 8
) -> dict[str, NDArray[np.float64]]:
    """Each row's loss by the trainer's own forward: no sampling between the weights and what is measured."""
    import torch

    from lora_hub_sdk.engine._encoded import Encoded
    from lora_hub_sdk.engine._gate_forward import FactorBank, GatedForward
    from lora_hub_sdk.engine._gate_rows import GateRow
    from lora_hub_sdk.engine.adapter_file import load_factors
    from lora_hub_sdk.engine.gate_training import GateTrainer

    base = hub.engine(_BASE, settings).base
    adapters = hub.list()
    number = {adapter.name: place for place, adapter in enumerate(adapters)}
    forward = GatedForward(base, FactorBank([load_factors(adapter) for adapter in adapters], base))
    encoded = Encoded(GateTrainer(), base, [GateRow(row.inputs, row.task, row.targets) for row in rows])
    routing = Routing("mixture", _K, "similarity")
    routes = hub.route([row.inputs for row in rows], base_model=_BASE, routing=routing)
    near = [[number[member.adapter.name] for member in route.members] for route in routes]
    shares = [[member.weight for member in route.members] for route in routes]
    routers = {path: (router.a.to(base.device), router.b.to(base.device)) for path, router in gate.routers.items()}
    ways: dict[str, tuple[list[list[int]], Any, Any]] = {
        _OWN: ([[number[row.task]] for row in rows], None, None),
        "uniform": (near, None, None),
        "similarity": (near, None, shares),
        "ramole": (near, routers, None),
    }
    losses: dict[str, NDArray[np.float64]] = {}
    with torch.inference_mode():
        for name, (members, chosen, weights) in ways.items():
            each: list[float] = []
            for start in range(0, len(rows), batch):
                part = slice(start, start + batch)
                tokens = encoded.batch(range(len(rows))[part])
                each += forward.losses(tokens, members[part], chosen, weights and weights[part]).tolist()
            losses[name] = np.array(each)
    return losses


def _report(
    options: argparse.Namespace,
    gate: Ramole,
    group: str,
    rows: Sequence[TestRow],
    scores: Mapping[str, NDArray[np.float64]],
    losses: Mapping[str, NDArray[np.float64]],
) -> Report:
    draws = _draws([row.task for row in rows], options.seed)
    systems: dict[str, dict[str, Any]] = {}
    for name, values in scores.items():
        systems[name] = {"score": float(values.mean()), **_interval([values[draw].mean() for draw in draws])}
        systems[name]["by_task"] = {
            task: float(np.mean([value for value, row in zip(values, rows, strict=True) if row.task == task]))
            for task in dict.fromkeys(row.task for row in rows)
        }
        if name in losses:
            systems[name]["loss"] = float(losses[name].mean())
    ratios: dict[str, dict[str, Any]] = {}
    for one, other in _RATIOS:
        found = [scores[one][draw].mean() / max(scores[other][draw].mean(), 1e-9) for draw in draws]
        ratios[f"{one} / {other}"] = {"median": float(np.median(found)), **_interval(found)}
    for one in ("uniform", "similarity", _OWN):
        found = [(losses["ramole"][draw] - losses[one][draw]).mean() for draw in draws]
        ratios[f"loss: ramole - {one}"] = {"median": float(np.median(found)), **_interval(found)}
    return Report(
        machine=machine(),
        settings={
            "part": "gate",
            "tasks": group,
            "base_model": _BASE,
            "dtype": options.dtype,
            "k": _K,
            "gate": gate.digest[:12],
            "trained": sorted(gate.trained),
            "rows": len(rows),
            "steps": len(gate.training["losses"]),
            "held_out": {name: gate.training[name] for name in ("own_loss", "uniform_loss", "validation")},
        },
        systems=systems,
        ratios=ratios,
    )


def _draws(tasks: Sequence[str], seed: int) -> list[NDArray[np.int64]]:
    """Places of rows, drawn again and again: tasks first and then rows of each, as both are only a sample of many."""
    dice = np.random.default_rng(seed)
    places = [np.flatnonzero(np.array(tasks) == task) for task in dict.fromkeys(tasks)]
    return [
        np.concatenate([dice.choice(places[at], len(places[at])) for at in dice.choice(len(places), len(places))])
        for _ in range(_RESAMPLES)
    ]


def _interval(values: Sequence[float]) -> dict[str, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def _register(hub: LoraHub, shared: Path) -> list[str]:
    """Every real adapter, named as its task; returns the names."""
    names = sorted(folder.name for folder in (shared / "adapters").iterdir() if folder.is_dir())
    for name in names:
        samples = [row["inputs"] for row in _rows(shared, name, "train")[:_SAMPLES]]
        hub.register(shared / "adapters" / name, name=name, samples=samples, base_model=_BASE)
    return names


def _rows(shared: Path, task: str, part: str) -> list[dict[str, str]]:
    lines = (shared / "data" / "tasks" / f"{task}.{part}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``gate_quality`` reads, but for ``dtype``, ``threads``, ``width`` and ``batch``."""
    parser.add_argument("--shared", type=Path, default=_SHARED, help="folder of the real adapters and their tasks")
    parser.add_argument("--gate", type=Path, help="a file: trained into where it is new, taken where it is there")
    parser.add_argument("--fraction", type=float, default=0.4, help="the share of the adapters that is trained on")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--tasks", choices=("unseen", "trained", "unseen+trained"), default="unseen+trained")
    parser.add_argument("--train-rows", type=int, default=200, help="of each task")
    parser.add_argument("--test-rows", type=int, default=12, help="of each task that is answered")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=160, help="of a prompt in training")
    parser.add_argument("--seed", type=int, default=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks._variants_gate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    add_options(parser)
    return parser


if __name__ == "__main__":
    main()
