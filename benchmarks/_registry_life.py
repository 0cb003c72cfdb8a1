"""What opening, filling and keeping a registry costs: seconds, bytes on disk, bytes in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks._registry_data import ENCODER, Matrix, clustered, insert_in_bulk, registration
from benchmarks._registry_search import K, timed
from lora_hub_sdk.registry.exact_index import ExactIndex
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.types import AdapterFilter

ACTOR: Final = "bench"
#: Larger databases are written by bulk inserts of the same rows: one commit each would take minutes.
_MOST_ADDED: Final = 1000
_ROUNDS: Final = 3
_ROOT: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Life:
    """Seconds of one index.

    ``fill_s``: the first search of an index that is empty. ``reopen_s``: a new Registry on the same files until its
    first answer, where everything is imported. ``fresh_process_s``: the same as a program sees it, from the start of
    the interpreter to its end; ``fresh_*`` are parts of it.
    """

    fill_s: float
    reopen_s: float
    fresh_process_s: float
    fresh_import_s: float
    fresh_open_s: float
    fresh_first_search_s: float
    reindex_s: float


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes for each adapter: of the SQLite file, of Chroma's folder, and of the exact index in memory."""

    sql: float
    chroma_folder: float
    exact_memory: float


def open_at(folder: Path, index: str) -> Registry:
    """The benchmark's database of a folder, with "exact" or "chroma"."""
    return Registry(str(folder / "hub.db"), index=_place(folder, index), encoder=lambda: ENCODER, actor=ACTOR)


def fill_database(folder: Path, vectors: Matrix, namespaces: Sequence[str]) -> str:
    """Register the vectors, and say by which way."""
    registry = open_at(folder, "exact")
    rows = (registration(place, *row) for place, row in enumerate(zip(vectors, namespaces, strict=True)))
    try:
        if len(vectors) > _MOST_ADDED:
            insert_in_bulk(registry._engine, rows, ACTOR)
            return "bulk inserts of the same rows"
        for row in rows:
            registry.add(row)
        return "Registry.add"
    finally:
        registry.close()


def fill_index(registry: Registry) -> float:
    """Seconds of the first search, which brings the index to what SQL says."""
    return timed(partial(registry.search, _prompt(), K, AdapterFilter()))


def measure_life(folder: Path, index: str, fill_s: float) -> Life:
    """Reopen and reindex what is in a folder; nobody else may have it open."""
    reopened = [_reopened(folder, index) for _ in range(_ROUNDS)]
    fresh = [_in_fresh_process(folder, index) for _ in range(_ROUNDS)]
    registry = open_at(folder, index)
    try:
        _search(registry)
        reindex_s = timed(registry.reindex)
        assert registry.verify().agrees
    finally:
        registry.close()
    middle = {key: median(run[key] for run in fresh) for key in ("whole_s", "import_s", "open_s", "first_search_s")}
    return Life(
        fill_s=fill_s,
        reopen_s=median(reopened),
        fresh_process_s=middle["whole_s"],
        fresh_import_s=middle["import_s"],
        fresh_open_s=middle["open_s"],
        fresh_first_search_s=middle["first_search_s"],
        reindex_s=reindex_s,
    )


def measure_storage(folder: Path) -> Storage:
    """Nobody may have the database open, so that everything is in its one file."""
    memory, adapters = _exact_memory(folder)
    files = (path for path in (folder / "index").rglob("*") if path.is_file())
    return Storage(
        sql=(folder / "hub.db").stat().st_size / adapters,
        chroma_folder=sum(path.stat().st_size for path in files) / adapters,
        exact_memory=memory / adapters,
    )


def _exact_memory(folder: Path) -> tuple[int, int]:
    """Bytes of the filled index, and how many vectors it holds."""
    registry, index = open_at(folder, "exact"), ExactIndex()
    keys = sorted(registry.store.keys(ENCODER))
    tracemalloc.start()
    try:
        for entries in registry.store.entries(keys):
            index.put(entries)
        del entries
        return tracemalloc.get_traced_memory()[0], index.count()
    finally:
        tracemalloc.stop()
        registry.close()


def _reopened(folder: Path, index: str) -> float:
    registries: list[Registry] = []

    def reopen() -> None:
        registries.append(open_at(folder, index))
        _search(registries[0])

    taken = timed(reopen)
    registries[0].close()
    return taken


def _in_fresh_process(folder: Path, index: str) -> dict[str, Any]:
    place = _place(folder, index)
    command = [sys.executable, "-m", "benchmarks._registry_reopen", str(folder / "hub.db"), place]
    answers: list[str] = []

    def run() -> None:
        answers.append(subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout)

    taken = timed(run)
    return {**json.loads(answers[0]), "whole_s": taken}


def _search(registry: Registry) -> None:
    (hits,) = registry.search(_prompt(), K, AdapterFilter())
    assert len(hits) == K


def _prompt() -> list[Vector]:
    return list(clustered(1, samples=1, seed=3))


def _place(folder: Path, index: str) -> str:
    return "exact" if index == "exact" else str(folder / "index")
