"""The demo from end to end, on two adapters of a tiny base model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lora_hub_sdk.demo import ADAPTERS_FOLDER, DemoAdapter, demo_adapters
from lora_hub_sdk.demo.questions import draw_questions
from lora_hub_sdk.demo.report import render, what_next
from lora_hub_sdk.demo.run import PERFECT, SYSTEMS, DemoOptions, DemoReport, run_demo
from lora_hub_sdk.errors import MissingExtraError
from lora_hub_sdk.testing.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("demo") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> tuple[DemoAdapter, ...]:
    """Two adapters of the tiny base, in folders like the packaged ones."""
    folder = base.parent / "adapters"
    for seed, (task, stem) in enumerate(
        {"colours": "Name the colour of item", "sums": "Add up the numbers in"}.items()
    ):
        tiny_adapter(folder / task, base, seed=seed)
        rows = [{"inputs": f"{stem} {place}", "targets": "x", "task": task, "metric": "em"} for place in range(12)]
        for file, part in (("samples.jsonl", rows[:4]), ("heldout.jsonl", rows[4:])):
            (folder / task / file).write_text("".join(f"{json.dumps(row)}\n" for row in part), "utf-8")
    return demo_adapters(folder)


class Steps:
    """Writes down what a watcher is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def step(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))


@pytest.fixture(scope="module")
def kept(base: Path, adapters: tuple[DemoAdapter, ...]) -> tuple[DemoReport, Steps, DemoOptions]:
    options = DemoOptions(
        database=str(base.parent / "kept.db"), base_model=str(base), shown=4, per_task=3, max_new_tokens=4
    )
    steps = Steps()
    return run_demo(options, adapters=adapters, watcher=steps), steps, options


def test_the_report_has_every_part(kept: tuple[DemoReport, Steps, DemoOptions]) -> None:
    report, steps, _ = kept
    assert report.adapters == ("colours", "sums")
    assert sorted(answered.task for answered in report.answered) == ["colours", "colours", "sums", "sums"]
    assert all(answered.route["strategy"] == "mixture" for answered in report.answered)
    assert [system.system for system in report.systems] == [*SYSTEMS, PERFECT]
    assert report.measured_prompts == 6
    assert (report.top1, report.top3) == (100.0, 100.0)
    assert {what: (done, total) for what, done, total in steps.seen} == {
        "registering adapters": (2, 2),
        "answering with LangChain": (2, 2),
        "measuring systems": (6, 6),
    }


def test_the_routes_belong_to_their_prompts(kept: tuple[DemoReport, Steps, DemoOptions]) -> None:
    for answered in kept[0].answered:
        assert answered.route["adapters"][0]["name"] == answered.task


def test_the_report_is_json_and_can_be_read(kept: tuple[DemoReport, Steps, DemoOptions]) -> None:
    report, _, options = kept
    assert json.loads(json.dumps(report.as_dict()))["systems"][0]["system"] == "base model"
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(render(report))
    text = captured.get()
    for expected in (*SYSTEMS, PERFECT, "6 held-out prompts", f"lora-hub list --database {options.database}"):
        assert expected in text


def test_a_kept_registry_keeps_its_files_and_a_second_run_changes_nothing(
    kept: tuple[DemoReport, Steps, DemoOptions], adapters: tuple[DemoAdapter, ...]
) -> None:
    from lora_hub_sdk import LoraHub

    report, _, options = kept
    again = run_demo(options, adapters=adapters)
    assert [answered.answer for answered in again.answered] == [answered.answer for answered in report.answered]
    with LoraHub(str(options.database)) as hub:
        found = hub.list()
    assert [adapter.repo_id for adapter in found] == ["lora-hub-demo/colours", "lora-hub-demo/sums"]
    assert all((adapter.folder / "adapter_model.safetensors").is_file() for adapter in found)


def test_without_langchain_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in {"langchain_core", "langchain_lora_hub"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    with pytest.raises(MissingExtraError, match=r"lora-hub-sdk\[langchain\]"):
        run_demo()


def test_questions_are_mixed_disjoint_and_drawn_by_the_seed(adapters: tuple[DemoAdapter, ...]) -> None:
    drawn = draw_questions(adapters, shown=5, per_task=4, seed=1)
    shown, measured = ({question.prompt for question in part} for part in (drawn.shown, drawn.measured))
    assert (len(shown), len(measured)) == (5, 8)
    assert not shown & measured
    assert drawn == draw_questions(adapters, shown=5, per_task=4, seed=1)
    assert drawn != draw_questions(adapters, shown=5, per_task=4, seed=2)


def test_too_few_rows_give_what_there_is(adapters: tuple[DemoAdapter, ...]) -> None:
    drawn = draw_questions(adapters, shown=100, per_task=100, seed=0)
    assert len(drawn.shown) == sum(len(adapter.heldout) for adapter in adapters)
    assert drawn.measured == ()


def test_without_a_kept_registry_the_first_next_step_makes_one() -> None:
    lines = [str(line) for line in what_next(None)]
    assert lines[1].strip() == "lora-hub demo --database demo.db"
    assert all("--database demo.db" in line for line in lines[1:])


def test_every_packaged_adapter_can_be_read() -> None:
    adapters = demo_adapters()
    assert {adapter.name for adapter in adapters} == {
        path.parent.name for path in ADAPTERS_FOLDER.glob("*/heldout.jsonl")
    }
    for adapter in adapters:
        assert adapter.repo_id == f"lora-hub-demo/{adapter.name}"
        assert len(adapter.samples) >= 10
        assert not {row.inputs for row in adapter.heldout} & set(adapter.samples)
