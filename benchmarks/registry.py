"""What a registry of n adapters costs: registering, searching, opening and keeping it, with both vector indexes.

Everything that is compared runs in one process and in turns, so that a machine that others use slows all alike: read
the ratios. Vectors are made up, of 384 numbers; those called clustered lie as real adapters do.

    python -m benchmarks.registry
    python -m benchmarks.registry --sizes 100,1000 --json | jq '.sizes[].search'
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks._registry_data import Matrix, clustered, uniform
from benchmarks._registry_life import (
    Life,
    Storage,
    fill_database,
    fill_index,
    measure_life,
    measure_storage,
    open_at,
)
from benchmarks._registry_register import Rates, measure_registering
from benchmarks._registry_search import (
    BATCHES,
    Case,
    K,
    Latency,
    Pool,
    SearchTimes,
    measure_after_writes,
    measure_search,
    namespace_case,
    nearest_places,
    one_namespace_cases,
    overlap,
    recall,
)
from benchmarks._report import machine
from lora_hub_sdk.registry.index import Entry, IndexFilter
from lora_hub_sdk.registry.index_places import open_index
from lora_hub_sdk.types import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[tuple[Any, ...]]

_SIZES = "100,1000,10000,100000"
_NAMESPACES = 10
_PROMPTS = 200
_PUT = 1000
#: Below this a filter would leave fewer than three.
_FEWEST = 40
_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Size:
    """All of one number of adapters. ``recall`` is Chroma's recall@3 against the exact answer."""

    adapters: int
    filled_by: str
    search: tuple[SearchTimes, ...]
    first_search_after_a_write: dict[str, Latency]
    adds_per_s: float
    recall: dict[str, float]
    life: dict[str, Life]
    bytes_per_adapter: Storage


@dataclass(frozen=True, slots=True)
class Report:
    """One run."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    register: Rates
    sizes: Sequence[Size]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    report = measure(options.sizes, adapters=options.adapters, calls=options.calls)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        show(report)


def measure(sizes: Sequence[int], *, adapters: int, calls: int) -> Report:
    """Everything, one number of adapters after the other."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
        rates = measure_registering(Path(temporary), adapters)
    measured = []
    for count in sizes:
        with TemporaryDirectory(prefix="lora-hub-bench-") as temporary:
            measured.append(measure_size(Path(temporary), count, calls))
    versions = {name: version(name) for name in ("chromadb", "numpy", "sqlalchemy")}
    about = {**machine(), **versions, "sqlite": sqlite3.sqlite_version}
    return Report(about, {"sizes": sizes, "adapters": adapters, "calls": calls}, rates, measured)


def measure_size(folder: Path, count: int, calls: int) -> Size:
    """Everything that depends on the number of adapters."""
    vectors = clustered(count, samples=20, seed=1)
    prompts = clustered(_PROMPTS, samples=1, seed=2)
    one, several = folder / "one", folder / "several"
    filled_by = fill_database(one, vectors, [DEFAULT_NAMESPACE] * count)
    pool, fill_s = _open_pool(one, vectors, [DEFAULT_NAMESPACE] * count)
    search = _search(pool, one_namespace_cases(pool, prompts[0]), prompts, calls)
    found = {"clustered": recall(pool, prompts), "uniform": _uniform_recall(folder / "uniform", count)}
    after_writes, adds_per_s = measure_after_writes(pool)
    _close(pool)
    life = {index: measure_life(one, index, taken) for index, taken in fill_s.items()}
    storage = measure_storage(one)

    namespaces = [f"team-{place % _NAMESPACES}" for place in range(count)]
    fill_database(several, vectors, namespaces)
    pool, _ = _open_pool(several, vectors, namespaces)
    search += _search(pool, [namespace_case(pool)], prompts, calls)
    _close(pool)
    return Size(count, filled_by, tuple(search), after_writes, adds_per_s, found, life, storage)


def _open_pool(folder: Path, vectors: Matrix, namespaces: Sequence[str]) -> tuple[Pool, dict[str, float]]:
    pool = Pool(vectors, namespaces, open_at(folder, "exact"), open_at(folder, "chroma"))
    return pool, {"exact": fill_index(pool.exact), "chroma": fill_index(pool.chroma)}


def _close(pool: Pool) -> None:
    pool.exact.close()
    pool.chroma.close()


def _search(pool: Pool, cases: Sequence[Case], prompts: Matrix, calls: int) -> list[SearchTimes]:
    return [measure_search(pool, case, prompts, batch, calls) for case in cases for batch in BATCHES]


def _uniform_recall(folder: Path, count: int) -> float:
    """Of a bare Chroma index, on vectors that are hardest for a graph of neighbours."""
    vectors, prompts = uniform(count, seed=4), uniform(_PROMPTS, seed=5)
    index = open_index(folder, "uniform")
    try:
        for start in range(0, count, _PUT):
            part = enumerate(vectors[start : start + _PUT], start)
            index.put([Entry(place, place, DEFAULT_NAMESPACE, "bench/base", vector) for place, vector in part])
        rows = index.search(list(prompts), K, IndexFilter(DEFAULT_NAMESPACE))
    finally:
        index.close()
    wanted = [{f"{place}-{place}" for place in row} for row in nearest_places(vectors, prompts)]
    return overlap(wanted, [{key for key, _ in row} for row in rows])


def show(report: Report) -> None:
    """Print tables."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)  # a file takes tables as wide as they are
    console.print(f"{report.machine}\n{report.settings}", markup=False, highlight=False)
    print_table, rates, sizes = partial(_print_table, console), report.register, report.sizes
    rates_rows: Rows = [(rate.way, rate.adapters, rate.per_s) for rate in rates.rates]
    print_table(
        f"Registering from a warm cache, {rates.weights_bytes / 1e6:.1f} MB each",
        ("way", "n", "per second"),
        rates_rows,
    )
    print_table("Ratios of rates", ("of", "ratio"), list(rates.ratios.items()))
    for size in sizes:
        times = size.search
        who: Rows = [(case.case, case.batch, case.candidates) for case in times]
        taken = [map(_ms, case.systems.values()) for case in times]
        print_table(
            f"{size.adapters} adapters, written by {size.filled_by}: p50 / p99 in ms",
            ("case", "batch", "of", *times[0].systems),
            [(*row, *cells) for row, cells in zip(who, taken, strict=True)],
        )
        ratios = [case.ratios.values() for case in times]
        print_table(
            f"{size.adapters} adapters: median of ratios",
            ("case", "batch", "of", *times[0].ratios),
            [(*row, *cells) for row, cells in zip(who, ratios, strict=True)],
        )
        written = [(name, _ms(taken)) for name, taken in size.first_search_after_a_write.items()]
        print_table(f"{size.adapters} adapters: first search after a write", ("index", "p50 / p99 in ms"), written)
    lives = [((size.adapters, kind), life) for size in sizes for kind, life in size.life.items()]
    columns = ("n", "index", *(field.name for field in fields(Life)))
    print_table("Seconds", columns, [(*which, *asdict(life).values()) for which, life in lives])
    print_table(
        "Keeping",
        (
            "n",
            "adds per s",
            *(f"recall@3 {kind}" for kind in sizes[0].recall),
            *(f"{p.name} B" for p in fields(Storage)),
        ),
        [(s.adapters, s.adds_per_s, *s.recall.values(), *asdict(s.bytes_per_adapter).values()) for s in sizes],
    )


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Rows) -> None:
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(_cell, row))
    console.print(table)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(taken: Latency) -> str:
    return f"{taken.p50_ms:.2f} / {taken.p99_ms:.2f}"


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < _FEWEST:
        raise argparse.ArgumentTypeError(f"{min(sizes)}: expected {_FEWEST} or more")
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--sizes", type=_sizes, default=_SIZES, help="numbers of adapters, separated by commas")
    parser.add_argument("--adapters", type=int, default=48, help="how many are registered through the whole hub")
    parser.add_argument("--calls", type=int, default=100, help="of each search that is measured")
    return parser


if __name__ == "__main__":
    main()
