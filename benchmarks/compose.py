"""What composing adapters costs: tokens per second of our engine, of PEFT and of the paper's form, side by side.

All systems answer the same left-padded rows greedily with the same number of tokens, in one process, in turns: base,
mixture, ..., base, mixture, ... The first round warms up and is dropped. A machine that others use at the same time
slows down neighbours in a round alike, so read the ratios; the tokens per second are of this machine at that hour.

    python -m benchmarks.compose --dtype both
    python -m benchmarks.compose --json | jq .ratios        # one line of JSON for each dtype
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks._report import Asked, Report, Seconds, machine, spread, throughput_ratio
from benchmarks._rounds import in_turns, timed
from benchmarks._systems import EinsumSystem, EngineSystem, GenerateSystem, System, peft_systems
from benchmarks._workload import (
    Model,
    Sizes,
    Tokens,
    Workload,
    adapters_in,
    build_workload,
    checkpoint,
    random_adapters,
)
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.types import Adapter

#: The ratios that the project reports: throughput of the first over throughput of the second, and what is asked of it.
RATIOS: Final[Mapping[tuple[str, str], Asked | None]] = {
    ("base", "transformers"): Asked(1.0),
    ("mixture", "base"): Asked(0.8),
    ("fusion", "base"): None,
    ("selection", "base"): None,
    ("shared", "base"): None,
    ("mixture", "peft one active"): Asked(1.2),
    ("selection", "peft adapter_names"): Asked(3.0),
    ("mixture", "einsum"): Asked(4.0),
}
#: Pairs that must give the same tokens in float32.
AGREE: Final = (
    ("base", "transformers"),
    ("selection", "peft adapter_names"),
    ("mixture", "einsum"),
)
#: Systems so far behind that one workload tells enough.
SLOW: Final = ("peft adapter_names", "einsum")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    resolved, sizes = resolve_model(options.base_model), Sizes.of(options)
    with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
        adapters = (
            adapters_in(options.adapter_folder, resolved.folder)
            if options.adapter_folder
            else random_adapters(Path(temporary), resolved.folder, sizes.adapters, sizes.rank)
        )
        for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
            report = measure(checkpoint(resolved, dtype), adapters, sizes)
            if options.json:
                print(report.as_json(), flush=True)
            else:
                report.show()


def measure(
    model: Model,
    adapters: Sequence[Adapter],
    sizes: Sizes,
    *,
    without: Collection[str] = (),
    asked: Mapping[tuple[str, str], Asked | None] = RATIOS,
) -> Report:
    """All systems but those in ``without``, on one workload; what is asked of a ratio is told with it."""
    workload = build_workload(adapters, sizes, model.vocabulary)
    with closing(Engine(model.load())) as engine:
        systems = [system for system in build_systems(model, engine, workload, without) if system.name not in without]
        answers = {system.name: system.run(sizes.new_tokens) for system in systems}
        seconds = in_turns(
            {system.name: partial(system.run, sizes.new_tokens) for system in systems}, sizes.rounds, warm_up=False
        )
        first = {
            system.name: {"first_token_s": timed(partial(system.run, 1))}
            for system in systems
            if isinstance(system, EngineSystem)
        }
    tokens = sizes.batch * sizes.new_tokens
    return Report(
        machine=machine(),
        settings={
            "part": "steps",
            "base_model": model.id,
            "dtype": model.dtype,
            **asdict(sizes),
            "adapters": len(adapters),
        },
        systems={name: _throughput(taken, tokens) | first.get(name, {}) for name, taken in seconds.items()},
        ratios={
            f"{own} / {other}": _ratio(seconds, own, other, bound)
            for (own, other), bound in asked.items()
            if {own, other} <= seconds.keys()
        },
        agree={
            f"{own} == {other}": agreement(answers[own], answers[other])
            for own, other in AGREE
            if {own, other} <= seconds.keys()
        },
    )


def build_systems(model: Model, engine: Engine, workload: Workload, without: Collection[str] = ()) -> list[System]:
    """Every system that ``RATIOS`` names, in the order in which a round runs them."""
    # An engine may write into its model, and PEFT does, so neither shares it with the others.
    plain = model.load()
    systems: list[System] = [
        EngineSystem("base", engine, workload, workload.base),
        GenerateSystem("transformers", plain, plain.model, workload),
        EngineSystem("mixture", engine, workload, workload.mixture),
        EngineSystem("fusion", engine, workload, workload.fusion),
        EngineSystem("selection", engine, workload, workload.selection),
        EngineSystem("shared", engine, workload, workload.shared),
        *peft_systems(model.load(), workload),
    ]
    if "einsum" not in without:
        systems.append(EinsumSystem("einsum", plain, workload, workload.mixture))
    return systems


def agreement(own: Tokens, other: Tokens) -> dict[str, int]:
    """How many rows have the same tokens."""
    equal = sum(left == right for left, right in zip(own, other, strict=True))
    return {"rows_equal": equal, "rows": len(own)}


def _ratio(seconds: Seconds, own: str, other: str, asked: Asked | None) -> Mapping[str, object]:
    found = throughput_ratio(seconds, own, other)
    return found if asked is None else asked.of(found)


def _throughput(seconds: Sequence[float], tokens: int) -> dict[str, object]:
    by_round = [tokens / taken for taken in seconds]
    return {"tokens_per_s": by_round, **spread(by_round)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compose", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON for each dtype instead of tables")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--adapter-folder", type=Path, help="real adapters in its sub-folders, not random ones")
    Sizes.add_options(parser, Sizes())
    return parser


if __name__ == "__main__":
    main()
