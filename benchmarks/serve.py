"""What the faces cost: LangChain beside the engine, HTTP beside the hub, batches formed, time to the first token.

Everything that is compared runs in turns, after a round to warm up: read the ratios. What is asked of a ratio stands
beside it. The server runs in a process of its own, with a model of its own, on the same machine.

    python -m benchmarks.serve
    python -m benchmarks.serve --json --part http | jq .ratios     # one line of JSON for each report
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks import _serve_pool
from benchmarks._report import Report
from benchmarks._serve_faces import measure_batches, measure_langchain
from benchmarks._serve_http import measure_first_token, measure_http
from benchmarks._workload import Sizes

_SIZES: Final = Sizes(rounds=5)
#: Tokens of each answer where the number of batches is what counts.
_FEW: Final = 8

Part = Callable[[Path, Any, Sizes], Report]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    sizes = Sizes.of(options)
    with TemporaryDirectory(prefix="lora-hub-bench-") as folder:
        database = Path(folder, "hub.db")
        _serve_pool.fill(database, Path(folder), options.base_model, sizes)
        for name in [options.part] if options.part else PARTS:
            report = PARTS[name](database, options, sizes)
            if options.json:
                print(report.as_json(), flush=True)
            else:
                report.show()


def _langchain(database: Path, options: Any, sizes: Sizes) -> Report:
    return measure_langchain(database, options.base_model, options.dtype, sizes)


def _batches(database: Path, options: Any, sizes: Sizes) -> Report:
    few = replace(sizes, new_tokens=min(sizes.new_tokens, _FEW))
    return measure_batches(database, options.base_model, options.dtype, few, calls=options.calls)


def _http(database: Path, options: Any, sizes: Sizes) -> Report:
    return measure_http(database, options.base_model, options.dtype, sizes, at_once=options.at_once)


def _first_token(database: Path, options: Any, sizes: Sizes) -> Report:
    few = replace(sizes, new_tokens=min(sizes.new_tokens, _FEW))
    return measure_first_token(database, options.base_model, options.dtype, few, long_tokens=options.long_tokens)


PARTS: Final[Mapping[str, Part]] = {
    "langchain": _langchain,
    "batches": _batches,
    "http": _http,
    "first_token": _first_token,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON for each report instead of tables")
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    Sizes.add_options(parser, _SIZES)
    for name, default, text in (
        ("calls", 64, "of part batches"),
        ("at-once", 32, "requests of part http"),
        ("long-tokens", 96, "that the long requests of part first_token decode"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    return parser


if __name__ == "__main__":
    main()
