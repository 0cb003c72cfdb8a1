"""What encoding costs, and what accuracy pays for it: how much is read of a text, and in which precision.

All systems encode the same questions in each round, in an order drawn anew, so the ratios are of what met the same
noise of the machine. Accuracy is of the untrained encoder, with the adapters' means encoded in the same way.

    python -m benchmarks.encoding
    python -m benchmarks.encoding --data tasks --json
"""

from __future__ import annotations

import argparse
import json
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks._report import machine, throughput_ratio
from benchmarks._retriever_data import DATA, Material, other_tasks, paper
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.retriever.settings import RetrieverSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = np.ndarray[Any, np.dtype[np.float32]]
#: Tokens that are read, and how many of them from a text's end. The first is what a plain encoder does.
LENGTHS: Final = ((256, 0), (128, 0), (64, 0), (256, 64), (128, 32), (128, 64), (64, 16), (64, 32))
_ALONE: Final = 60


@dataclass(frozen=True)
class System:
    """One way to encode. ``threads`` of torch."""

    encoder: SentenceEncoder
    threads: int = 1

    def encode(self, texts: Sequence[str]) -> Array:
        with _threads(self.threads):
            return self.encoder.encode(texts)


@dataclass(frozen=True)
class Found:
    """``speed`` is the throughput in units of the first system's. Accuracy in percent; None where nothing can change.

    ``same`` percent of the questions find the adapter first that the first system finds. ``alone`` is the largest
    difference in a number of a vector between a text that was encoded alone and in a batch.
    """

    system: str
    speed: Mapping[str, float]
    top1: float | None
    top3: float | None
    same: float | None
    alone: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not DATA.is_dir():
        print("skipped: the tasks and questions are not beside this checkout")
        return
    material = paper() if options.data == "paper" else other_tasks()
    parts = {
        "lengths": measure(material, lengths(), options.rounds, options.questions),
        "precisions": measure(material, precisions(), options.rounds, options.questions),
        "again": again(material, options.rounds, options.questions),
    }
    if options.json:
        told = {part: [asdict(found) for found in founds] for part, founds in parts.items()}
        print(json.dumps({"machine": machine(), "data": material.name, "rounds": options.rounds, **told}))
    else:
        for part, founds in parts.items():
            _show(f"{part}, {material.name}", founds)


def lengths() -> dict[str, System]:
    """How much is read of a text."""
    return {
        f"{tokens} tokens" + (f", {tail} of them the end" if tail else ""): System(_encoder(tokens, tail))
        for tokens, tail in LENGTHS
    }


def precisions() -> dict[str, System]:
    """In which numbers the model computes. 64 tokens are read, half of them the end."""
    return {
        "float32": System(_encoder(64, 32)),
        "float32, 2 threads": System(_encoder(64, 32), threads=2),
        "bfloat16": System(_changed(lambda model: model.bfloat16())),
        "int8": System(_changed(_to_int8)),
    }


def measure(material: Material, systems: Mapping[str, System], rounds: int, questions: int) -> list[Found]:
    """Speed and accuracy of each system; the first is what the others are compared with."""
    asked = [question.text for question in material.clean]
    timed = random.Random(0).sample(asked, min(questions, len(asked)))
    seconds = _seconds({name: partial(system.encode, timed) for name, system in systems.items()}, rounds)
    first = next(iter(systems))
    found, right = [], _gold(material)
    before: Any = None
    for name, system in systems.items():
        vectors = system.encode(asked)
        order = np.argsort(-vectors @ _means(material, system).T, axis=1, kind="stable")
        before = order if before is None else before
        alone = np.concatenate([system.encode([text]) for text in asked[:_ALONE]])
        found.append(
            Found(
                name,
                speed=throughput_ratio(seconds, name, first),
                top1=_percent(order[:, 0] == right),
                top3=_percent((order[:, :3] == right[:, None]).any(axis=1)),
                same=_percent(order[:, 0] == before[:, 0]),
                alone=float(np.abs(alone - vectors[:_ALONE]).max()),
            )
        )
    return found


def again(material: Material, rounds: int, questions: int) -> list[Found]:
    """What a text costs that was encoded before."""
    texts = [question.text for question in material.clean][:questions]
    forgetful, own = _encoder(256, 0), SentenceEncoder(resolve_model("all-minilm-l6-v2"))
    own.encode(texts)
    seconds = _seconds({"new": lambda: forgetful.encode(texts), "again": lambda: own.encode(texts)}, rounds)
    return [Found(name, throughput_ratio(seconds, name, "new"), None, None, None, None) for name in seconds]


def _seconds(systems: Mapping[str, Callable[[], Array]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample(list(systems), len(systems)):
            start = time.perf_counter()
            systems[name]()
            if turn:  # the first one loads the models
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _encoder(tokens: int, tail: int) -> SentenceEncoder:
    settings = RetrieverSettings(max_tokens=tokens, tail_tokens=tail)
    return SentenceEncoder(resolve_model("all-minilm-l6-v2"), device="cpu", settings=settings, cache_bytes=0)


def _changed(change: Callable[[Any], Any]) -> SentenceEncoder:
    encoder = _encoder(64, 32)
    change(encoder._loaded())
    return encoder


def _to_int8(model: Any) -> None:
    """The weights of the linear layers as int8, their inputs by the range of each batch."""
    import torch

    quantize: Any = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _means(material: Material, system: System) -> Array:
    """(tasks, d), each of length 1."""
    rows = [system.encode(task.inputs).mean(axis=0) for task in material.tasks]
    means: Array = np.stack([row / np.linalg.norm(row) for row in rows])
    return means


def _gold(material: Material) -> np.ndarray[Any, np.dtype[np.int64]]:
    places = {task.name: place for place, task in enumerate(material.tasks)}
    return np.array([places[question.task] for question in material.clean], dtype=np.int64)


def _percent(right: Any) -> float:
    return 100 * float(np.mean(right))


def _show(title: str, founds: Sequence[Found]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title, "speed", "from - to", "top 1 %", "top 3 %", "same %", "alone")
    for found in founds:
        accuracy = ["" if value is None else f"{value:.1f}" for value in (found.top1, found.top3, found.same)]
        table.add_row(
            found.system,
            f"{found.speed['median']:.2f}",
            f"{found.speed['min']:.2f} - {found.speed['max']:.2f}",
            *accuracy,
            "" if found.alone is None else f"{found.alone:.0e}",
        )
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=("paper", "tasks"), default="paper")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=200, help="how many are timed")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    main()
