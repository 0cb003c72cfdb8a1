"""Every command of ``lora-hub`` on a tiny base model: its output, its JSON, its errors and exit codes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_hub_sdk.cli import app
from lora_hub_sdk.cli.batch import FIELDS
from lora_hub_sdk.demo.run import DemoOptions, DemoReport, SystemScore, Watcher
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.intake import AdapterRequest
from lora_hub_sdk.registry._hub_cache import HubCache
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import LocalHub
from lora_hub_sdk.testing.tiny import tiny_adapter, tiny_base

DATES = ("Convert this date to ISO: 3 May 1968", "Write 1 June 2001 as YYYY-MM-DD")
MOODS = ("Is this review positive or negative? I loved it", "Sentiment of: the food was awful")
#: Commands that take --endpoint.
ASKING = {"discover", "inspect", "register", "update", "search", "generate", "verify", "reindex", "switch-encoder"}
FAST = ("--max-new-tokens", "4", "--strategy", "mixture", "-k", "2")


@dataclass(frozen=True)
class Setup:
    """A database with two adapters for a tiny base, and a Hub that has nothing else."""

    database: Path
    base: Path
    hub: LocalHub
    folder: Path

    def run(self, *args: str, stdin: str | None = None) -> Result:
        """Run a command on a database; ``--endpoint`` keeps it from the real Hub."""
        local = ("--endpoint", self.hub.url) if args[0] in ASKING else ()
        return CliRunner().invoke(app, [*args, "--database", str(self.database), *local], input=stdin)

    def error(self, *args: str, stdin: str | None = None) -> tuple[str, str]:
        """Type and message of the error that a command ends with."""
        result = self.run(*args, "--json", stdin=stdin)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
        error = json.loads(result.stdout)["error"]
        return error["type"], error["message"]

    def json(self, *args: str, stdin: str | None = None) -> Any:
        result = self.run(*args, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("cli")
    base = tiny_base(folder / "base")
    dates, moods = tiny_adapter(folder / "dates", base, rank=4), tiny_adapter(folder / "moods", base, rank=2, seed=1)
    (moods / "README.md").write_text("---\nlicense: mit\n---\nTells moods.\n")
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        # gc frees what it finds there, so it shall not be the developer's own cache.
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hf"))
        hub.publish("someone/dates", dates)
        setup = Setup(folder / "hub.db", base, hub, folder)
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
    return replace(filled, database=database, folder=tmp_path)


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


def test_register_can_forget_the_samples(own: Setup, filled: Setup) -> None:
    moods = str(filled.folder / "moods")
    adapter = own.json("register", moods, "--name", "quiet", "--sample", "one", "--sample", "two", "--drop-samples")
    assert adapter["sample_count"] == 2
    assert own.json("show", "quiet")["samples"] == []


def test_an_adapter_without_samples_is_registered_by_a_guess_and_says_so(own: Setup, filled: Setup) -> None:
    shown = own.run("register", str(filled.folder / "moods"), "--name", "guessed")
    assert shown.exit_code == 0, shown.output
    assert "guessed from its weights" in shown.stdout
    assert own.json("show", "guessed")["origin"] == "guess"
    hits = own.json("search", MOODS[0], "-k", "9")
    assert {hit["adapter"]["name"]: hit["trust"] for hit in hits}["guessed"] == "low"
    assert "guessed" not in own.run("search", MOODS[0], "-k", "9", "--min-trust", "medium").stdout


# -- many adapters at once ----------------------------------------------------------------------------------------


@pytest.fixture
def many(own: Setup, filled: Setup) -> Path:
    """Three good lines, and between them one of every kind of failure."""
    moods = filled.folder / "moods"
    (own.folder / "texts").mkdir()
    (own.folder / "texts" / "a.jsonl").write_text('"first"\n{"inputs": "second"}\n')
    lines = (
        {"reference": str(moods), "name": "a", "samples": "texts/a.jsonl", "tags": ["x"], "description": None},
        "{oops",
        {"reference": "someone/else", "samples": ["x"]},
        "",
        {"reference": str(moods), "name": "b", "samples": ["one"], "keep_samples": False, "namespace": "mine"},
        {"reference": str(moods), "name": "c", "samples": ["one"], "redact": "x"},
        {"reference": str(moods), "name": "c", "samples": ["one"], "tags": "mood"},
        {"reference": str(moods), "name": "c", "samples": "texts/missing.jsonl"},
        {"name": "c"},
        str(moods),
    )
    file = own.folder / "many.jsonl"
    written = (line if line in ("", "{oops") else json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text("\n".join(written) + "\n")
    return file


def test_a_bad_line_of_many_stops_no_other(own: Setup, many: Path) -> None:
    result = own.run("register", "--from-file", str(many), "--workers", "2", "--json")
    assert result.exit_code == 1, result.output
    assert result.stderr == ""
    rows = json.loads(result.stdout)
    assert {row["line"]: row["adapter"]["name"] for row in rows if row["adapter"]} == {1: "a", 5: "b", 10: "moods"}
    errors = {row["line"]: row["error"] for row in rows if row["error"]}
    assert errors[3] == {"type": "RepoNotFoundError", "message": errors[3]["message"]}
    for line, told in (
        (2, "no JSON"),
        (6, "'redact'"),
        (7, "a list of texts"),
        (8, "cannot be read"),
        (9, "reference"),
    ):
        assert errors[line]["type"] == "ConfigurationError", errors[line]
        assert told in errors[line]["message"]
    assert len(rows) == 9
    assert own.json("show", "a")["samples"] == ["first", "second"]
    assert own.json("show", "a")["tags"] == ["x"]
    assert own.json("show", "b", "--namespace", "mine")["samples"] == []
    assert own.json("namespaces") == ["default", "mine"]
    assert own.run("namespaces").stdout == "default\nmine\n"


def test_many_adapters_for_people_are_a_table_and_a_bar_where_somebody_watches(
    own: Setup, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwatched = own.run("register", "--from-file", str(many))
    assert (unwatched.exit_code, unwatched.stderr) == (1, "")
    assert "3 of 9 adapters are registered" in unwatched.stdout
    assert "someone/else" in unwatched.stdout
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert "5/5" in own.run("register", "--from-file", str(many)).stderr  # four lines ask for nothing
    assert "4/4" in own.run("reindex", "--index", "exact").stderr
    assert own.run("reindex", "--index", "exact", "--json").stderr == ""


def test_many_adapters_from_stdin_get_the_namespace_of_the_command(own: Setup, filled: Setup) -> None:
    line = json.dumps({"reference": str(filled.folder / "moods"), "samples": ["x"]})
    (row,) = own.json("register", "--from-file", "-", "--namespace", "piped", stdin=f"\ufeff{line}\r\n")
    assert row["adapter"]["namespace"] == "piped"
    assert own.json("register", "--from-file", "-", stdin="\n") == []


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("someone/dates", "--from-file", "many.jsonl"),
        ("--from-file", "many.jsonl", "--sample", "x"),
        ("--from-file", "many.jsonl", "--drop-samples"),
    ],
)
def test_one_adapter_or_a_file_of_them_but_not_both(own: Setup, args: Sequence[str]) -> None:
    result = own.run("register", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--from-file" in result.stderr


def test_a_file_of_adapters_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    command = ["register", "--from-file", str(tmp_path / "none"), "--database", str(tmp_path / "hub.db")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "cannot be read" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_line_may_say_all_that_a_request_can_but_code() -> None:
    assert FIELDS.keys() == {field.name for field in fields(AdapterRequest)} - {"redact"}


# -- how they change ------------------------------------------------------------------------------------------


def test_an_adapter_is_updated_held_and_its_old_files_are_freed(own: Setup, filled: Setup) -> None:
    repo, name = f"someone/{own.folder.name}", "moving"
    first = filled.hub.publish(repo, filled.folder / "dates")
    own.json("register", repo, "--name", name, "--sample", DATES[0], "--actor", "ann")
    assert "nothing newer" in own.run("update", name).stdout
    second = filled.hub.publish(repo, tiny_adapter(own.folder / "newer", filled.base, rank=3, seed=5))
    assert own.json("pin", name)["pinned"] is True
    assert "active, pinned" in own.run("list").stdout
    assert own.error("update", name)[0] == "PinnedError"
    assert name in own.run("unpin", name).stdout
    updated = own.run("update", name)
    assert updated.exit_code == 0, updated.output
    assert f"at {second[:12]}" in updated.stdout
    assert f"was at {first[:12]}" in updated.stdout

    told = own.json("gc", "--dry-run")
    assert told == {**told, "commits": [f"{repo}@{first}"], "busy": [], "dry_run": True}
    assert told["size_bytes"] > 0
    assert f"{repo}@{first}" in own.run("gc", "--dry-run").stdout
    with HubCache(None).lease(repo, first):
        assert own.json("gc")["busy"] == [f"{repo}@{first}"]
        assert "left alone" in own.run("gc").stdout
    assert own.run("gc").stdout.startswith("freed ")
    assert own.json("gc") == {"size_bytes": 0, "commits": [], "busy": [], "dry_run": False}
    assert own.json("update", name, "--revision", first)["revision"] == first  # downloaded again

    events = own.json("events", name)
    assert [event["action"] for event in events][-1] == "registered"
    assert events[-1]["actor"] == "ann"
    assert "ann" in own.run("events", name, "--namespace", "default").stdout
    assert len(own.json("events", "--limit", "1")) == 1
    assert own.json("events", "never-there") == []


def test_update_takes_other_samples(own: Setup) -> None:
    updated = own.json("update", "moods", "--samples", "-", stdin='"quite another thing"\n')
    assert updated["sample_count"] == 1
    assert own.json("show", "moods")["samples"] == ["quite another thing"]
    assert own.error("update", "nobody")[0] == "AdapterNotFoundError"
    assert own.error("update", "moods", "--samples", str(own.folder / "none.jsonl"))[0] == "ConfigurationError"


def test_a_retired_adapter_is_not_found_until_it_is_restored(own: Setup) -> None:
    found = ("search", DATES[0], "--index", "exact")
    assert own.json("retire", "dates")["state"] == "retired"
    assert "retired" in own.run("list").stdout
    assert [hit["adapter"]["name"] for hit in own.json(*found)] == ["moods"]
    assert "in service" in own.run("restore", "dates").stdout
    assert len(own.json(*found)) == 2
    for command in ("pin", "unpin", "retire", "restore"):
        assert own.error(command, "nobody")[0] == "AdapterNotFoundError"


def test_offline_asks_no_hub(own: Setup) -> None:
    before = len(own.hub.requests)
    assert own.error("inspect", "someone/never-pulled", "--offline")[0] == "DownloadError"
    assert own.error("register", "someone/never-pulled", "--sample", "x", "--offline")[0] == "DownloadError"
    assert len(own.hub.requests) == before


# -- what a Hub has ------------------------------------------------------------------------------------------


def test_discover_finds_what_could_be_registered(filled: Setup, tmp_path: Path) -> None:
    looking = replace(filled, database=tmp_path / "none.db")
    for name, kind in (("good", "LORA"), ("bad", "IA3")):
        (tmp_path / name).mkdir()
        config = {"peft_type": kind, "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base/small"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        (tmp_path / name / "README.md").write_text("---\nbase_model: base/small\ntags: [lora]\n---\n")
        filled.hub.publish(f"finder/{name}", tmp_path / name)
    (candidate,) = looking.json("discover", "base/small")
    assert (candidate["repo_id"], candidate["rank"], candidate["problem"]) == ("finder/good", 4, None)
    both = looking.json("discover", "base/small", "--refused")
    assert {row["repo_id"] for row in both} == {"finder/good", "finder/bad"}
    shown = looking.run("discover", "base/small", "--refused", "--limit", "5")
    assert "finder/good" in shown.stdout
    assert "IA3" in shown.stdout
    assert "no adapters" in looking.run("discover", "base/small", "--query", "nothing-like-it").stdout
    assert looking.run("discover", "base/small", "--limit", "0").exit_code == 2
    assert looking.error("discover", str(filled.base))[0] == "ConfigurationError"
    assert not looking.database.exists()


def test_inspect_reports_every_check_and_registers_nothing(filled: Setup, tmp_path: Path) -> None:
    looking = replace(filled, database=tmp_path / "none.db")
    report = looking.json("inspect", "someone/dates")
    assert report["accepted"] is True
    assert report["rank"] == 4
    assert {check["passed"] for check in report["checks"]} == {True}
    assert "would be registered" in looking.run("inspect", str(filled.folder / "moods")).stdout

    broken = shutil.copytree(filled.folder / "moods", tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused = looking.run("inspect", str(broken))
    assert (refused.exit_code, refused.stderr) == (1, "")
    assert "DamagedWeightsError" in refused.stdout
    assert "not reached" in refused.stdout
    assert json.loads(looking.run("inspect", str(broken), "--json").stdout)["accepted"] is False
    assert looking.error("inspect", "someone/else")[0] == "RepoNotFoundError"
    assert not looking.database.exists()


# -- how they did ------------------------------------------------------------------------------------------


def test_scores_are_kept_and_shown(own: Setup) -> None:
    told = own.json("score", "dates", "iso", "accuracy", "0.75", "--actor", "ann")
    assert (told["name"], told["task"], told["metric"], told["value"]) == ("dates", "iso", "accuracy", 0.75)
    assert "iso/loss = -1.5 for dates" in own.run("score", "dates", "iso", "loss", "-1.5").stdout
    scores = {score["metric"]: score["value"] for score in own.json("show", "dates")["scores"]}
    assert scores == {"accuracy": 0.75, "loss": -1.5}
    assert "iso/accuracy = 0.75" in own.run("show", "dates").stdout
    assert own.json("events", "dates", "--limit", "2")[1]["actor"] == "ann"
    assert own.error("score", "nobody", "iso", "accuracy", "1")[0] == "AdapterNotFoundError"
    assert own.error("score", "dates", "iso", "accuracy", "nan")[0] == "ConfigurationError"
    assert own.run("score", "dates", "iso", "accuracy", "good").exit_code == 2
    assert own.run("score", "dates", "iso", "accuracy", "1", "--acter", "ann").exit_code == 2


# -- search and answers ------------------------------------------------------------------------------------------


def test_search_finds_the_adapter_whose_samples_are_alike(filled: Setup) -> None:
    hits = filled.json("search", "Convert this date to ISO: 9 July 1980", "-k", "2")
    assert [hit["adapter"]["name"] for hit in hits] == ["dates", "moods"]
    assert {hit["trust"] for hit in hits} == {"high"}
    assert hits[0]["score"] > hits[1]["score"]
    shown = filled.run("search", "Convert this date to ISO: 9 July 1980", "-k", "1")
    assert "dates" in shown.stdout
    assert "high" in shown.stdout
    assert "moods" not in shown.stdout


def test_search_tells_the_relevance_where_words_put_in_order(filled: Setup) -> None:
    prompt = "Convert this date to ISO: 9 July 1980"
    plain = filled.json("search", prompt, "--no-rerank")
    assert [hit["relevance"] for hit in plain] == [None] * len(plain)
    reranked = filled.json("search", prompt, "--rerank")
    assert {hit["adapter"]["name"]: hit["score"] for hit in reranked} == {
        hit["adapter"]["name"]: hit["score"] for hit in plain
    }
    assert reranked[0]["adapter"]["name"] == "dates"
    assert reranked[0]["relevance"] > reranked[1]["relevance"]
    assert "relevance" in filled.run("search", prompt, "--rerank").stdout
    assert "relevance" not in filled.run("search", prompt).stdout


def test_search_takes_only_what_its_filters_let_through(own: Setup) -> None:
    own.json("score", "dates", "glue/dates", "exact match", "0.5")
    for options, names in (
        ((), ["dates", "moods"]),
        (("--tag", "mood"), ["moods"]),
        (("--tag", "mood", "--tag", "other"), []),
        (("--license", "MIT", "--license", "apache-2.0"), ["moods"]),
        (("--scored", "glue/dates/exact match=0.5"), ["dates"]),
        (("--scored", "glue/dates/exact match=0.6"), []),
        (("--min-trust", "high"), ["dates", "moods"]),
    ):
        hits = own.json("search", DATES[0], "--index", "exact", *options)
        assert [hit["adapter"]["name"] for hit in hits] == names, options
    assert "no adapters" in own.run("search", DATES[0], "--tag", "other").stdout
    for wrong in ("sst2=0.9", "sst2/accuracy", "sst2/accuracy=good", "/accuracy=1"):
        refused = own.run("search", DATES[0], "--scored", wrong)
        assert (refused.exit_code, refused.stdout) == (2, ""), wrong
        assert "TASK/METRIC=VALUE" in refused.stderr


def test_generate_filters_as_search_does(filled: Setup) -> None:
    common = ("generate", DATES[0], "--base-model", str(filled.base), "--max-new-tokens", "1")
    (answer,) = filled.json(*common, "--tag", "mood", "--license", "mit")
    assert [member["name"] for member in answer["route"]["adapters"]] == ["moods"]
    assert filled.error(*common, "--scored", "nobody/measured=1")[0] == "NoAdaptersError"


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
        (("--timeout", "0"), "ConfigurationError"),
        (("--timeout", "0.000001"), "DeadlineExceededError"),
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
        ("retire", "x"),
        ("update", "x"),
        ("score", "x", "task", "metric", "1"),
        ("events",),
        ("namespaces",),
        ("gc",),
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


def test_switch_encoder_embeds_all_and_other_commands_follow(own: Setup) -> None:
    before = own.json("search", "a date", "-k", "2")
    switch = ("switch-encoder", "all-minilm-l6-v2", "--instruction", "Find: ", "--offline")
    told = own.json(*switch)
    assert (told["encoder"], told["embedded"]) == ("sentence-transformers/all-MiniLM-L6-v2", 2)
    after = own.json("search", "a date", "-k", "2")
    assert [hit["adapter"]["name"] for hit in after] == [hit["adapter"]["name"] for hit in before] == ["dates", "moods"]
    assert [hit["score"] for hit in after] != pytest.approx([hit["score"] for hit in before], abs=1e-3)
    assert own.json("verify")["unembedded"] == []
    assert "0 adapters were embedded" in own.run(*switch).stdout
    event = own.json("events", "--limit", "1")[0]
    assert (event["action"], event["detail"]["encoder"]) == ("switched", told["fingerprint"])
    error, message = own.error("switch-encoder", "no/such-encoder", "--offline")
    assert error == "ModelNotFoundError"
    assert "no/such-encoder" in message
    assert own.json("search", "a date", "-k", "2") == after


def test_verify_and_reindex(own: Setup, encoder: SentenceEncoder) -> None:
    assert own.json("reindex") == {"vectors": 2}
    agreed = {"agrees": True, "vectors": 2, "missing": [], "surplus": [], "changed": [], "unembedded": []}
    assert own.json("verify") == agreed
    assert "agree on 2 vectors" in own.run("verify").stdout
    with LoraHub(own.database, encoder=encoder) as hub:
        index = hub._registry._follower._index
        lost, changed = sorted(index.keys())
        entry = next(hub._registry.store.entries([changed]))[0]
        index.delete([lost, changed])
        index.put([replace(entry, vector=-entry.vector), replace(entry, adapter_id=99, embedding_id=99)])
    damaged = own.run("verify", "--json")
    assert damaged.exit_code == 1
    assert json.loads(damaged.stdout) == {
        **agreed,
        "agrees": False,
        "missing": [lost],
        "surplus": ["99-99"],
        "changed": [changed],
    }
    shown = own.run("verify")
    assert shown.exit_code == 1
    assert "lacks 1, has 1 changed and 1 too many; run: lora-hub reindex" in shown.stdout
    assert own.json("verify", "--index", str(own.folder / "elsewhere")) == agreed
    assert "holds 2 vectors" in own.run("reindex").stdout
    assert own.json("verify") == agreed


def test_the_index_may_be_named_by_the_environment(own: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HUB_INDEX", str(own.folder / "named"))
    own.json("reindex")
    assert (own.folder / "named" / "chroma.sqlite3").is_file()
    assert not list(own.folder.glob("own.db.*"))


def test_db_check_and_upgrade(tmp_path: Path, filled: Setup) -> None:
    versions = filled.json("db", "check")
    assert versions["current"] == versions["head"]
    fresh = replace(filled, database=tmp_path / "fresh.db")
    assert fresh.json("db", "upgrade") == {"from": None, "to": versions["head"]}
    assert "is current" in fresh.run("db", "upgrade").stdout
    with sqlite3.connect(fresh.database) as connection:
        connection.execute("DELETE FROM alembic_version")
    connection.close()
    behind = fresh.run("db", "check", "--json")
    assert behind.exit_code == 1
    assert json.loads(behind.stdout) == {"current": None, "head": versions["head"]}


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path, filled: Setup) -> None:
    wrong = replace(filled, database=tmp_path / "text.db")
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


@pytest.mark.parametrize(
    "args", [["--help"], ["generate", "--help"], ["list"], ["show", "dates"], ["events"], ["unpin", "dates"]]
)
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
