"""A tiny zoo in place of the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest

from benchmarks import _zoo as zoo
from lora_hub_sdk.testing import tiny_adapter

FRUIT: Final = ("apple", "pear", "plum", "fig", "quince", "cherry", "grape", "melon")


def write_rows(folder: Path, task: str, part: str, count: int, *, start: int = 0, asks: str = "Say {}") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "inputs": asks.format(f"{FRUIT[number % len(FRUIT)]} {number}"),
            "targets": FRUIT[number % len(FRUIT)],
            "task": task,
            "domain": "fruit and more",
            "metric": "em",
        }
        for number in range(start, start + count)
    ]
    (folder / f"{task}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def small_zoo(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters of two tasks, and rows of three; returns the folder of another adapter of the first task."""
    adapters, more, tasks = (tmp_path / name for name in ("adapters", "more", "tasks"))
    for task in ("one", "two", "three"):
        write_rows(tasks, task, "train", 40, asks=f"{task} {{}}")
        write_rows(tasks, task, "test", 10, start=38, asks=f"{task} {{}}")
    for seed, folder in enumerate((adapters / "one", adapters / "two", more / "one", more / "stranger")):
        tiny_adapter(folder, base, seed=seed)
    (more / "three").mkdir()
    (more / "three" / "adapter_config.json").write_text("{}")
    (tasks / "manifest.json").write_text(json.dumps([{"task": task} for task in ("one", "two", "three")]))
    monkeypatch.setattr(zoo, "ADAPTERS", adapters)
    monkeypatch.setattr(zoo, "TASKS", tasks)
    return more
