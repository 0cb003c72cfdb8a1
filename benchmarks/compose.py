"""What composing adapters costs: tokens per second of our engine, of PEFT and of the paper's form, side by side.

All systems answer the same left-padded rows greedily with the same number of tokens, in one process, in turns: base,
mixture, ..., base, mixture, ... The first round warms up and is dropped. A machine that others use at the same time
slows down neighbours in a round alike, so read the ratios; the tokens per second are of this machine at that hour.

    python -m benchmarks.compose --dtype both
    python -m benchmarks.compose --json | jq .ratios        # one line of JSON for each dtype
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Final

from benchmarks._report import Report, machine, spread, throughput_ratio
from benchmarks._systems import EinsumSystem, EngineSystem, GenerateSystem, System, peft_systems
from benchmarks._workload import (
    Tokens,
    Workload,
    adapter_folders,
    build_workload,
    load_endless,
    random_adapters,
    read_adapters,
)
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.shapes import module_shapes
from lora_hub_sdk.models import ResolvedModel, resolve_model

#: The ratios that the project reports: throughput of the first over throughput of the second.
RATIOS: Final = (
    ("base", "transformers"),
    ("mixture", "base"),
    ("fusion", "base"),
    ("selection", "base"),
    ("mixture", "peft one active"),
    ("selection", "peft adapter_names"),
    ("mixture", "einsum"),
)
#: Pairs that must give the same tokens in float32.
AGREE: Final = (
    ("base", "transformers"),
    ("selection", "peft adapter_names"),
    ("mixture", "einsum"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    resolved = resolve_model(options.base_model)
    with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
        folders = (
            adapter_folders(options.adapter_folder)
            if options.adapter_folder
            else random_adapters(Path(temporary), resolved, options.adapters, options.rank)
        )
        for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
            report = measure(resolved, folders, dtype, options)
            if options.json:
                print(report.as_json(), flush=True)
            else:
                report.show()


def measure(resolved: ResolvedModel, folders: Sequence[Path], dtype: str, options: argparse.Namespace) -> Report:
    """All systems in one dtype."""
    workload = _workload(resolved, folders, options)
    systems = build_systems(resolved, workload, dtype)
    answers = {system.name: system.run(options.new_tokens) for system in systems}
    seconds = _rounds(systems, options.rounds, options.new_tokens)
    tokens = options.batch * options.new_tokens
    return Report(
        machine=machine(),
        settings=_settings(resolved, folders, dtype, options),
        systems={system.name: _throughput(seconds[system.name], tokens) | _parts(system) for system in systems},
        ratios={f"{own} / {other}": throughput_ratio(seconds, own, other) for own, other in RATIOS},
        agree={f"{own} == {other}": agreement(answers[own], answers[other]) for own, other in AGREE},
    )


def build_systems(resolved: ResolvedModel, workload: Workload, dtype: str) -> list[System]:
    """Every system that ``RATIOS`` names, in the order in which a round runs them."""
    base = load_endless(resolved, dtype)
    engine = Engine(base, max_batch_size=len(workload.prompts))
    return [
        EngineSystem("base", engine, workload, workload.base),
        GenerateSystem("transformers", base, base.model, workload),
        EngineSystem("mixture", engine, workload, workload.mixture),
        EngineSystem("fusion", engine, workload, workload.fusion),
        EngineSystem("selection", engine, workload, workload.selection),
        # PEFT writes its layers into the model, so it gets a copy of its own.
        *peft_systems(load_endless(resolved, dtype), workload),
        EinsumSystem("einsum", base, workload, workload.mixture),
    ]


def agreement(own: Tokens, other: Tokens) -> dict[str, int]:
    """How many rows have the same tokens."""
    equal = sum(left == right for left, right in zip(own, other, strict=True))
    return {"rows_equal": equal, "rows": len(own)}


def _rounds(systems: Sequence[System], rounds: int, new_tokens: int) -> dict[str, list[float]]:
    """Seconds of each system by rounds."""
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    for _ in range(rounds):
        for system in systems:
            seconds[system.name].append(_timed(partial(system.run, new_tokens)))
    return seconds


def _parts(system: System) -> dict[str, float]:
    """Of our engine, the seconds of composing alone, and of composing and the prompt up to the first token; once."""
    if not isinstance(system, EngineSystem):
        return {}
    return {"compose_s": _timed(system.compose), "first_token_s": _timed(partial(system.run, 1))}


def _timed(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _throughput(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    by_round = [tokens / taken for taken in seconds]
    return {"tokens_per_s": by_round, **spread(by_round)}


def _workload(resolved: ResolvedModel, folders: Sequence[Path], options: argparse.Namespace) -> Workload:
    from transformers import AutoConfig

    return build_workload(
        read_adapters(folders, module_shapes(resolved.folder)),
        batch=options.batch,
        k=options.k,
        prompt_tokens=options.prompt_tokens,
        vocabulary=AutoConfig.from_pretrained(resolved.folder).vocab_size,
    )


def _settings(
    resolved: ResolvedModel, folders: Sequence[Path], dtype: str, options: argparse.Namespace
) -> Mapping[str, Any]:
    kept = ("batch", "k", "prompt_tokens", "new_tokens", "rounds", "threads")
    return {
        "base_model": resolved.id,
        "dtype": dtype,
        "adapters": len(folders),
        "random_rank": None if options.adapter_folder else options.rank,
        **{name: getattr(options, name) for name in kept},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compose", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON for each dtype instead of tables")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--adapter-folder", type=Path, help="real adapters in its sub-folders, not random ones")
    parser.add_argument("--adapters", type=int, default=48, help="how many random adapters")
    parser.add_argument("--rank", type=int, default=6, help="of the random adapters")
    for name, default, text in (
        ("batch", 16, "rows"),
        ("k", 3, "adapters of each row's mixture and fusion"),
        ("prompt-tokens", 64, "tokens of the longest prompt; the shortest has half of them"),
        ("new-tokens", 32, "tokens that every row decodes"),
        ("rounds", 5, "measured rounds, after one to warm up"),
        ("threads", 2, "of torch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    return parser


if __name__ == "__main__":
    main()
