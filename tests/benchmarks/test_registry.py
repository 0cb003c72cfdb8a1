"""The registry benchmark on few adapters: its report has the promised shape and its answers agree. No timings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from benchmarks._registry_data import ENCODER, clustered, insert_in_bulk, registration
from benchmarks._registry_search import nearest_places, overlap
from benchmarks.registry import Report, main, measure, show
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.tables import Base

SYSTEMS = ["exact", "exact index", "chroma", "chroma index", "numpy"]


@pytest.fixture(scope="module")
def measured() -> Report:
    return measure([50], adapters=4, calls=5)


@pytest.mark.slow
def test_one_report_with_every_case_of_every_size(measured: Report) -> None:
    report = json.loads(json.dumps(asdict(measured)))

    assert report.keys() == {"machine", "settings", "register", "sizes"}
    assert report["machine"].keys() >= {"cpu", "chromadb", "sqlite"}
    assert len(report["register"]["rates"]) == 9
    assert all(rate["per_s"] > 0 for rate in report["register"]["rates"])
    (size,) = report["sizes"]
    assert (size["adapters"], size["filled_by"]) == (50, "Registry.add")
    assert size["recall"] == {"clustered": 1.0, "uniform": 1.0}
    candidates = {(times["case"], times["batch"]): times["candidates"] for times in size["search"]}
    assert candidates == {
        (case, batch): count
        for case, count in (
            ("one namespace", 50),
            ("base model, 50 %", 30),
            ("tag, 10 %", 5),
            ("3 names excluded", 47),
            ("1 of 10 namespaces", 5),
        )
        for batch in (1, 32)
    }
    for times in size["search"]:
        assert list(times["systems"]) == SYSTEMS
        assert all(taken["p50_ms"] <= taken["p99_ms"] for taken in times["systems"].values())
    assert size["life"].keys() == {"exact", "chroma"}
    assert all(seconds > 0 for life in size["life"].values() for seconds in life.values())
    assert size["bytes_per_adapter"]["exact_memory"] > 384 * 4


@pytest.mark.slow
def test_tables_for_people(measured: Report, capsys: pytest.CaptureFixture[str]) -> None:
    show(measured)
    out = capsys.readouterr().out
    assert "register_many" in out
    assert "1 of 10 namespaces" in out
    assert "recall@3 uniform" in out


def test_too_few_adapters_for_its_filters_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sizes", "100,39"])
    assert "expected 40 or more" in capsys.readouterr().err


def test_bulk_inserts_write_what_add_writes(tmp_path: Path) -> None:
    vectors = clustered(12, samples=20, seed=1)
    rows = [registration(place, vector, f"team-{place % 2}") for place, vector in enumerate(vectors)]
    added, bulk = (
        Registry(str(tmp_path / name), index="exact", encoder=lambda: ENCODER, actor="ann")
        for name in ("added", "bulk")
    )
    for row in rows:
        added.add(row)
    insert_in_bulk(bulk._engine, iter(rows), "ann")

    assert contents(added) == contents(bulk)
    assert bulk.verify().agrees
    added.close()
    bulk.close()


def test_the_yardstick_finds_what_sorting_finds() -> None:
    rows, queries = clustered(60, samples=20, seed=1), clustered(9, samples=1, seed=2)
    wanted = np.argsort(-(queries @ rows.T), axis=1)[:, :3]
    assert nearest_places(rows, queries).tolist() == wanted.tolist()
    assert nearest_places(rows[:2], queries).shape == (9, 2)


def test_recall_is_the_share_of_the_wanted() -> None:
    assert overlap([{"a", "b"}, {"c", "d"}], [{"a", "b"}, {"c", "x"}]) == 0.75


def contents(registry: Registry) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, but for times and this registry's own id."""
    with registry._engine.connect() as connection:
        tables = {
            table.name: [dict(row) for row in connection.execute(text(f"select * from {table.name}")).mappings()]
            for table in Base.metadata.sorted_tables
        }
    for rows in tables.values():
        for row in rows:
            for column in ("at", "created_at", "updated_at"):
                row.pop(column, None)
    tables["meta"] = [row for row in tables["meta"] if row["key"] != "registry_id"]
    assert tables["samples"]
    return {name: sorted(rows, key=repr) for name, rows in tables.items()}
