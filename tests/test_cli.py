"""Every command of ``lora-hub`` on a tiny base model: its output, its JSON, its errors and exit codes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_hub_sdk.cli import app
from lora_hub_sdk.demo.run import DemoOptions, DemoReport, SystemScore, Watcher
from lora_hub_sdk.testing import LocalHub
from lora_hub_sdk.testing.tiny import tiny_adapter, tiny_base

DATES = ("Convert this date to ISO: 3 May 1968", "Write 1 June 2001 as YYYY-MM-DD")
MOODS = ("Is this review positive or negative? I loved it", "Sentiment of: the food was awful")
FAST = ("--max-new-tokens", "4", "--strategy", "mixture", "-k", "2")


@dataclass(frozen=True)
class Setup:
    """A database with two adapters for a tiny base, and a Hub that has nothing else."""

    database: Path
    base: Path
    endpoint: str
    folder: Path

    def run(self, *args: str, stdin: str | None = None) -> Result:
        """Run a command on a database; ``--endpoint`` keeps it from the real Hub."""
        local = () if args[0] in {"list", "show", "db"} else ("--endpoint", self.endpoint)
        return CliRunner().invoke(app, [*args, "--database", str(self.database), *local], input=stdin)

    def json(self, *args: str, stdin: str | None = None) -> Any:
        result = self.run(*args, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_base(folder / "base")
    dates, moods = tiny_adapter(folder / "dates", base, rank=4), tiny_adapter(folder / "moods", base, rank=2, seed=1)
    with LocalHub() as hub:
        hub.publish("someone/dates", dates)
        setup = Setup(folder / "hub.db", base, hub.url, folder)
        rows = "\n".join(json.dumps({"inputs": text, "targets": "x"}) for text in DATES)
        registered = setup.json("register", "someone/dates", "--samples", "-", "--name", "dates", stdin=rows)
        assert registered["repo_id"] == "someone/dates"
        setup.json("register", str(moods), "--sample", MOODS[0], "--sample", MOODS[1], "--tag", "mood")
        yield setup


@pytest.fixture
def own(filled: Setup, tmp_path: Path) -> Setup:
    """A copy of the database that a test may change."""
    database = tmp_path / "own.db"
    with sqlite3.connect(filled.database) as source, sqlite3.connect(database) as target:
        source.backup(target)
    return Setup(database, filled.base, filled.endpoint, tmp_path)


# -- what adapters exist ------------------------------------------------------------------------------------------


def test_list_tells_what_a_reader_needs_and_json_has_every_field(filled: Setup) -> None:
    shown = filled.run("list")
    assert shown.exit_code == 0
    found = filled.json("list")
    assert [adapter["name"] for adapter in found] == ["dates", "moods"]
    assert found[0]["rank"] == 4
    assert found[0]["target_modules"] == ["q_proj", "v_proj"]
    for expected in ("2 adapters", "dates", "moods", found[0]["revision"][:12]):
        assert expected in shown.stdout


def test_list_filters_by_namespace_and_base_model(filled: Setup) -> None:
    assert filled.json("list", "--namespace", "elsewhere") == []
    assert filled.json("list", "--base-model", "some/other-base") == []
    assert len(filled.json("list", "--base-model", str(filled.base))) == 2


def test_show_has_the_samples(filled: Setup) -> None:
    assert filled.json("show", "dates")["samples"] == list(DATES)
    shown = filled.run("show", "moods")
    assert MOODS[1] in shown.stdout
    assert "mood" in shown.stdout


def test_an_unknown_name_is_one_line_on_stderr_and_exit_code_1(filled: Setup) -> None:
    result = filled.run("show", "date")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "did you mean 'dates'?" in result.stderr
    assert "Traceback" not in result.output


def test_with_json_an_error_is_json_on_stdout(filled: Setup) -> None:
    result = filled.run("show", "nothing-like-it", "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 1
    assert error["type"] == "AdapterNotFoundError"
    assert "nothing-like-it" in error["message"]


def test_registering_the_same_again_changes_nothing(own: Setup, filled: Setup) -> None:
    again = own.json("register", str(filled.folder / "moods"))
    assert again == filled.json("list")[1]


def test_register_reads_text_files_and_json_strings(own: Setup, filled: Setup) -> None:
    moods = str(filled.folder / "moods")
    text = own.folder / "samples.txt"
    text.write_text("first\n\nsecond\n")
    own.json("register", moods, "--name", "a", "--samples", str(text), "--namespace", "other")
    lines = own.folder / "samples.jsonl"
    lines.write_text('"one"\n{"inputs": "two"}\n')
    own.json("register", moods, "--name", "b", "--samples", str(lines), "--sample", "three", "--description", "Moods.")
    assert own.json("show", "a", "--namespace", "other")["samples"] == ["first", "second"]
    assert own.json("show", "b")["samples"] == ["one", "two", "three"]
    assert own.json("show", "b")["description"] == "Moods."


@pytest.mark.parametrize(
    ("content", "problem"), [("{oops\n", "line 1 is no JSON"), ('"good"\n7\n', "line 2: expected a text or an object")]
)
def test_bad_sample_lines_are_named(own: Setup, filled: Setup, content: str, problem: str) -> None:
    lines = own.folder / "bad.jsonl"
    lines.write_text(content)
    result = own.run("register", str(filled.folder / "moods"), "--name", "c", "--samples", str(lines))
    assert result.exit_code == 1
    assert problem in result.stderr


def test_a_missing_samples_file_and_a_missing_repository_are_errors(own: Setup) -> None:
    missing = own.run("register", "someone/dates", "--samples", str(own.folder / "none.jsonl"))
    assert missing.exit_code == 1
    assert "cannot be read" in missing.stderr
    unknown = own.run("register", "someone/else", "--sample", "x", "--json")
    assert unknown.exit_code == 1
    assert json.loads(unknown.stdout)["error"]["type"] == "RepoNotFoundError"


def test_remove_forgets_the_adapter(own: Setup) -> None:
    assert own.json("remove", "dates")["name"] == "dates"
    assert [adapter["name"] for adapter in own.json("list")] == ["moods"]
    assert own.run("remove", "dates").exit_code == 1


# -- search and answers ------------------------------------------------------------------------------------------


def test_search_finds_the_adapter_whose_samples_are_alike(filled: Setup) -> None:
    hits = filled.json("search", "Convert this date to ISO: 9 July 1980", "-k", "2")
    assert [hit["adapter"]["name"] for hit in hits] == ["dates", "moods"]
    assert hits[0]["score"] > hits[1]["score"]
    shown = filled.run("search", "Convert this date to ISO: 9 July 1980", "-k", "1")
    assert "dates" in shown.stdout
    assert "moods" not in shown.stdout


def test_generate_answers_all_prompts_in_one_batch(filled: Setup) -> None:
    prompts = (DATES[0], MOODS[0])
    answers = filled.json("generate", *prompts, "--base-model", str(filled.base), *FAST)
    assert [answer["prompt"] for answer in answers] == list(prompts)
    assert {answer["batch_size"] for answer in answers} == {2}
    for answer, nearest in zip(answers, ("dates", "moods"), strict=True):
        route = answer["route"]
        assert (route["strategy"], route["adapters"][0]["name"]) == ("mixture", nearest)
        assert answer["usage"]["completion_tokens"] <= 4


def test_generate_reads_prompts_from_stdin(filled: Setup) -> None:
    shown = filled.run("generate", "-", "--base-model", str(filled.base), *FAST, stdin="one thing\n\nanother\n")
    assert shown.exit_code == 0, shown.output
    assert "> one thing" in shown.stdout
    assert "> another" in shown.stdout
    assert shown.stdout.count("[mixture:") == 2
    empty = filled.run("generate", "-", stdin="\n")
    assert (empty.exit_code, empty.stdout) == (1, "")
    assert "holds no prompts" in empty.stderr


def test_generate_with_a_pinned_adapter_and_with_the_base_alone(filled: Setup) -> None:
    common = ("generate", "hello", "--base-model", str(filled.base), "--max-new-tokens", "2", "--template", "none")
    (pinned,) = filled.json(*common, "--adapter", "moods")
    assert [(member["name"], member["score"]) for member in pinned["route"]["adapters"]] == [("moods", None)]
    (base,) = filled.json(*common, "--strategy", "base")
    assert base["route"]["adapters"] == []
    assert "the base model alone" in filled.run(*common, "--strategy", "base").stdout


def test_generate_repeats_itself_with_a_seed(filled: Setup) -> None:
    common = ("generate", "hello", "--base-model", str(filled.base), *FAST, "--temperature", "1.5", "--seed", "7")
    assert filled.json(*common)[0]["text"] == filled.json(*common)[0]["text"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--strategy", "magic"), "UnknownStrategyError"),
        (("--adapter", "nobody"), "AdapterNotFoundError"),
        (("--min-score", "0.1", "-k", "0"), "ConfigurationError"),
        (("--namespace", "empty"), "NoAdaptersError"),
    ],
)
def test_generate_maps_errors(filled: Setup, options: Sequence[str], error: str) -> None:
    result = filled.run("generate", "hello", "--base-model", str(filled.base), *options, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == error


def test_usage_errors_have_exit_code_2(filled: Setup) -> None:
    assert filled.run("generate", "hello", "--dtype", "int3").exit_code == 2
    assert filled.run("search").exit_code == 2
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2


# -- the database ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ("list",),
        ("show", "x"),
        ("search", "x"),
        ("remove", "x"),
        ("generate", "x"),
        ("verify",),
        ("reindex",),
        ("db", "check"),
    ],
)
def test_a_missing_database_is_an_error_and_stays_missing(filled: Setup, tmp_path: Path, args: Sequence[str]) -> None:
    for database in (str(tmp_path / "none.db"), f"sqlite:///{tmp_path}/none.db"):
        result = CliRunner().invoke(app, [*args, "--database", database])
        assert result.exit_code == 1
        assert "does not exist" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_verify_and_reindex(own: Setup) -> None:
    before = own.run("verify", "--json")
    assert before.exit_code == 1  # the copy came without the index beside it
    assert len(json.loads(before.stdout)["missing"]) == 2
    assert "lora-hub reindex" in own.run("verify").stdout
    assert own.json("reindex") == {"vectors": 2}
    assert own.json("verify") == {"agrees": True, "vectors": 2, "missing": [], "surplus": [], "unembedded": []}


def test_db_check_and_upgrade(tmp_path: Path, filled: Setup) -> None:
    versions = filled.json("db", "check")
    assert versions["current"] == versions["head"]
    fresh = Setup(tmp_path / "fresh.db", filled.base, filled.endpoint, tmp_path)
    assert fresh.json("db", "upgrade") == {"from": None, "to": versions["head"]}
    assert "is current" in fresh.run("db", "upgrade").stdout
    with sqlite3.connect(fresh.database) as connection:
        connection.execute("DELETE FROM alembic_version")
    connection.close()
    behind = fresh.run("db", "check", "--json")
    assert behind.exit_code == 1
    assert json.loads(behind.stdout) == {"current": None, "head": versions["head"]}


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path, filled: Setup) -> None:
    wrong = Setup(tmp_path / "text.db", filled.base, filled.endpoint, tmp_path)
    shutil.copy(__file__, wrong.database)
    for args in (("list",), ("db", "check"), ("db", "upgrade")):
        result = wrong.run(*args, "--json")
        assert result.exit_code == 1, args
        assert json.loads(result.stdout)["error"]["type"] == "SchemaError"


# -- the demo (what it does is tested in tests/demo/test_run.py) -------------------------------------------


def test_demo_passes_its_options_on_and_prints_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[DemoOptions] = []

    def stand_in(options: DemoOptions, *, watcher: Watcher) -> DemoReport:
        seen.append(options)
        watcher.step("registering adapters", 1, 1)
        return DemoReport(
            adapters=("dates",),
            answered=(),
            measured_prompts=7,
            systems=(SystemScore("base model", 12.5, 0.1),),
            top1=90.0,
            top3=100.0,
            dtype="bfloat16",
            database=options.database,
        )

    monkeypatch.setattr("lora_hub_sdk.demo.run.run_demo", stand_in)
    database = str(tmp_path / "demo.db")
    shown = CliRunner().invoke(app, ["demo", "--database", database, "--per-task", "3", "--seed", "5"])
    assert shown.exit_code == 0, shown.output
    assert (seen[0].database, seen[0].per_task, seen[0].seed, seen[0].dtype) == (database, 3, 5, None)
    assert "7 held-out prompts" in shown.stdout
    assert "lora-hub demo --database demo.db" in CliRunner().invoke(app, ["demo"]).stdout
    as_json = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout)
    assert as_json["systems"] == [{"system": "base model", "score": 12.5, "seconds": 0.1}]
    assert as_json["top3"] == 100.0


# -- the program ------------------------------------------------------------------------------------------


def test_the_entry_point_prints_nothing_but_json(filled: Setup) -> None:
    program = Path(sys.executable).with_name("lora-hub")
    done = subprocess.run(
        [program, "list", "--database", filled.database, "--json"], capture_output=True, text=True, check=True
    )
    assert [adapter["name"] for adapter in json.loads(done.stdout)] == ["dates", "moods"]
    assert done.stderr == ""


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["list"], ["show", "dates"]])
def test_light_commands_import_no_heavy_library(filled: Setup, args: list[str]) -> None:
    if args[-1] != "--help":
        args = [*args, "--database", str(filled.database)]
    program = (
        "import sys\nfrom lora_hub_sdk.cli import app\n"
        f"try:\n    app({args!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'chromadb', 'peft', 'langchain_core'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
