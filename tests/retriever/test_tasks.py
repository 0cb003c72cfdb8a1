"""Tasks from files and registries, and their splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.tasks import Task, read_tasks, split_tasks, tasks_of
from lora_hub_sdk.testing import tiny_adapter


def written(folder: Path, *rows: object) -> Path:
    file = folder / "tasks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


def test_rows_of_one_task_come_together_in_order(tmp_path: Path) -> None:
    rows = [
        {"task": "b", "domain": "x", "inputs": "one", "targets": "ignored"},
        {"task": "a", "inputs": ["first", "second", "First "]},
        {"task": "b", "domain": "x", "inputs": "two"},
    ]
    assert read_tasks(written(tmp_path, *rows)) == [Task("b", ("one", "two"), "x"), Task("a", ("first", "second"))]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "no row"),
        (["just a secret text"], "expected an object"),
        ([{"inputs": "secret"}], '"task" names no task'),
        ([{"task": "a"}], '"inputs" is neither'),
        ([{"task": "a", "inputs": ["secret", 3]}], '"inputs" is neither'),
        ([{"task": "a", "inputs": {"secret": 1}}], '"inputs" is neither'),
        ([{"task": "a", "inputs": "secret", "domain": 3}], '"domain" is no text'),
        ([{"task": "a", "inputs": "x", "domain": "d"}, {"task": "a", "inputs": "secret", "domain": "e"}], "row 2: "),
    ],
)
def test_rows_of_another_form_are_told_by_their_number_and_never_quoted(
    tmp_path: Path, rows: list[object], told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        read_tasks(written(tmp_path, *rows))
    assert "secret" not in str(caught.value)


def test_a_task_without_any_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="empty"):
        read_tasks(written(tmp_path, {"task": "empty", "inputs": [" ", ""]}))


def test_a_split_depends_on_names_and_seed_alone() -> None:
    tasks = [Task(str(number), ("x",)) for number in range(48)]
    trained, unseen = split_tasks(tasks, 0.4, 3)
    assert (len(trained), len(unseen)) == (19, 29)
    again, _ = split_tasks(list(reversed(tasks)), 0.4, 3)
    assert {task.name for task in again} == {task.name for task in trained}
    assert trained == [task for task in tasks if task not in unseen]
    assert split_tasks(tasks, 0.4, 4)[0] != trained
    assert split_tasks(tasks, 1, 0) == (tasks, [])
    assert len(split_tasks(tasks, 0.001)[0]) == 2


@pytest.mark.parametrize("fraction", [0, -1, 1.5, True, "all", float("nan")])
def test_a_fraction_that_makes_no_sense_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match="fraction="):
        split_tasks([Task("a", ("x",))], fraction)


def test_adapters_in_service_with_samples_are_tasks(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    hub = open_hub(base_folders={"org/tiny": base})
    for number, name in enumerate(["kept", "dropped", "retired"]):
        folder = tiny_adapter(tmp_path / name, base, seed=number, base_name="org/tiny")
        hub.register(
            folder, name=name, samples=[f"{name} prompt"], keep_samples=name != "dropped", tags=["domain:nli", "x"]
        )
    hub.retire("retired")
    assert tasks_of(hub) == [Task("kept", ("kept prompt",), "nli")]
    with pytest.raises(SamplesError, match="no adapter in service"):
        tasks_of(hub, "elsewhere")
