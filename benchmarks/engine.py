"""What the engine costs and holds to: composing, memory, many adapters, many callers, adapters that are on disk only.

Everything that is compared runs in one process and in turns, after a round to warm up, so that a machine that others
use slows all alike: read the ratios. What is asked of a ratio stands beside it.

    python -m benchmarks.engine
    python -m benchmarks.engine --json --part steps --dtype both | jq .ratios     # one line of JSON for each report
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks._engine_cold import measure_cold
from benchmarks._engine_forms import measure_forms
from benchmarks._engine_loops import measure_loops
from benchmarks._engine_memory import measure_memory
from benchmarks._engine_zipf import measure_zipf
from benchmarks._report import Report
from benchmarks._workload import Model, Sizes, checkpoint, random_adapters
from benchmarks.compose import SLOW, measure
from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.models import resolve_model

_DEMO_MODEL: Final = "smollm2-135m-instruct"
_SIZES: Final = Sizes(shortest=64, rounds=3)
#: Tokens of each answer where the number of answers is what counts.
_FEW: Final = 16

Part = Callable[[Model, Path, argparse.Namespace], Iterator[Report]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    resolved = resolve_model(options.base_model)
    for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        for name in [options.part] if options.part else PARTS:
            with TemporaryDirectory(prefix="lora-hub-bench-", dir=options.folder) as temporary:
                for report in PARTS[name](checkpoint(resolved, dtype), Path(temporary), options):
                    if options.json:
                        print(report.as_json(), flush=True)
                    else:
                        report.show()


def _steps(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    sizes = Sizes.of(options)
    adapters = random_adapters(folder, model.folder, sizes.adapters, sizes.rank)
    yield measure(model, adapters, sizes)
    # The same with padding.
    yield measure(model, adapters, replace(sizes, shortest=sizes.prompt_tokens // 2), without=SLOW)


def _memory(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    sizes = Sizes.of(options)
    yield measure_memory(model, random_adapters(folder, model.folder, sizes.adapters, sizes.rank), sizes)


def _zipf(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    sizes = replace(Sizes.of(options), new_tokens=_FEW, rounds=min(options.rounds, 2))
    adapters = random_adapters(folder, model.folder, options.many, sizes.rank, dtype="bfloat16")
    yield measure_zipf(model, adapters, sizes, requests=options.requests, budget=options.budget)


def _callers(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    from benchmarks._engine_callers import measure_arrivals, measure_calls

    sizes = Sizes.of(options)
    adapters = random_adapters(folder, model.folder, max(sizes.adapters, len(demo_adapters())), sizes.rank)
    own = [task.folder for task in demo_adapters()]
    folders = own if options.base_model == _DEMO_MODEL else [adapter.folder for adapter in adapters[: len(own)]]
    yield measure_calls(options.base_model, folders, model.dtype, replace(sizes, new_tokens=_FEW), calls=options.calls)
    yield measure_arrivals(model, adapters, sizes, long_tokens=options.long_tokens)


def _cold(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    sizes = Sizes.of(options)
    # Two more, which warm up.
    yield measure_cold(model, random_adapters(folder, model.folder, options.cold + 2, sizes.rank), sizes)


def _forms(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    sizes = Sizes.of(options)
    yield measure_forms(model, random_adapters(folder, model.folder, sizes.adapters, sizes.rank), sizes)


def _loops(model: Model, folder: Path, options: argparse.Namespace) -> Iterator[Report]:
    sizes = Sizes.of(options)
    yield measure_loops(model, random_adapters(folder, model.folder, sizes.k, sizes.rank), sizes)


PARTS: Final[Mapping[str, Part]] = {
    "steps": _steps,
    "memory": _memory,
    "zipf": _zipf,
    "callers": _callers,
    "cold": _cold,
    "forms": _forms,
    "loops": _loops,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON for each report instead of tables")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--base-model", default=_DEMO_MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where adapters are written meanwhile; a thousand take 4 GB")
    Sizes.add_options(parser, _SIZES)
    for name, default, text in (
        ("many", 1000, "adapters of part zipf"),
        ("requests", 320, "of part zipf"),
        ("budget", 100, "adapters that part zipf has memory for"),
        ("calls", 64, "of part callers"),
        ("long-tokens", 160, "that the long requests of part callers decode"),
        ("cold", 20, "adapters of part cold"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    return parser


if __name__ == "__main__":
    main()
