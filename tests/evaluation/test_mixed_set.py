"""Mixed sets: read from files and Hub datasets, sampled, told apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lora_hub_sdk.errors import ConfigurationError, RepoNotFoundError, RevisionNotFoundError
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet, load_mixed_hub, read_mixed
from lora_hub_sdk.testing import LocalHub


def row(number: int, task: str = "sum", domain: str = "math", metric: str = "em", **other: Any) -> dict[str, Any]:
    return {
        "inputs": f"{task} {number}?",
        "targets": str(number),
        "task": task,
        "domain": domain,
        "metric": metric,
    } | other


def many(*tasks: str, count: int = 30) -> MixedSet:
    return MixedSet(tuple(MixedRow(**row(number, task)) for task in tasks for number in range(count)))


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path


# -- reading ---------------------------------------------------------------------------------------------------


def test_a_file_a_folder_and_a_glob_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.test.jsonl", row(1, "b"), row(2, "b"))
    file = write(tmp_path / "a.test.jsonl", row(1, "a"))
    write(tmp_path / "a.train.jsonl", row(9, "a"))
    assert [one.inputs for one in read_mixed(file).rows] == ["a 1?"]
    assert [one.inputs for one in read_mixed(str(tmp_path / "*.test.jsonl")).rows] == ["a 1?", "b 1?", "b 2?"]
    assert [one.inputs for one in read_mixed(tmp_path).rows] == ["a 1?", "a 9?", "b 1?", "b 2?"]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    file = write(tmp_path / "a.jsonl", row(1, inputs=text), row(2))
    assert [one.inputs for one in read_mixed(file).rows] == [text, "sum 2?"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([row(1), row(2, inputs=7)], r"row 2: 'inputs' is a int, expected a text"),
        ([row(1) | {"targets": None}], r"row 1: 'targets' is a NoneType"),
        ([{"inputs": "SECRET"}], r"row 1: 'targets' is missing"),
        ([row(1, inputs=" \n")], r"row 1: 'inputs' is blank"),
        ([row(1, task="")], r"row 1: 'task' is blank"),
        ([row(1, metric="SECRET")], r"row 1: its metric is none of em, rouge1"),
        (["SECRET"], r"row 1: expected an object with inputs, .*found a str"),
        ([], r"hold no row"),
    ],
)
def test_a_bad_row_is_told_by_its_place_and_never_by_its_content(
    content: list[object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=told) as caught:
        read_mixed(write(tmp_path / "asked.jsonl", *content))
    assert "asked.jsonl" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_line_that_is_no_json_is_told_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps(row(1)) + "\n\n{SECRET\n")
    with pytest.raises(ConfigurationError, match=r"asked\.jsonl', line 3 is no JSON") as caught:
        read_mixed(tmp_path)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("source", ["nothing.jsonl", "*.none", "."])
def test_where_there_is_no_file_it_is_said_what_was_expected(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="found no file; expected a file, a folder"):
        read_mixed(source)


def test_an_answer_may_have_to_be_nothing(tmp_path: Path) -> None:
    assert read_mixed(write(tmp_path / "a.jsonl", row(1, targets=""))).rows[0].targets == ""


def test_columns_and_what_all_rows_share_can_be_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"question": "Why?", "answer": "So.", "task": "of another kind"})
    found = read_mixed(
        file, columns={"inputs": "question", "targets": "answer"}, task="why", domain="qa", metric="rouge"
    )
    assert found.rows == (MixedRow("Why?", "So.", "why", "qa", "rouge"),)
    with pytest.raises(ConfigurationError, match="'question' is no field of a question; those are inputs, targets"):
        read_mixed(file, columns={"question": "inputs"})
    with pytest.raises(ConfigurationError, match="row 1: 'prompt' is missing"):
        read_mixed(file, columns={"inputs": "prompt"})


@pytest.mark.parametrize("holder", [lambda rows: rows, lambda rows: {"version": "1", "data": rows}])
def test_a_json_file_holds_its_rows_as_a_list(holder: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(holder([row(1), row(2)])))
    assert [one.targets for one in read_mixed(file).rows] == ["1", "2"]


@pytest.mark.parametrize("content", ["7", '"SECRET"', "{SECRET", "\udcff"])
def test_a_json_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match=r"a\.json") as caught:
        read_mixed(file)
    assert "SECRET" not in str(caught.value)


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"SECRET")
    with pytest.raises(ConfigurationError, match=r"a\.parquet' is no Parquet file") as caught:
        read_mixed(tmp_path / "a.parquet")
    assert "SECRET" not in str(caught.value)


def test_every_file_of_the_evaluation_material_can_be_read(shared: Path) -> None:
    folder = shared / "data" / "tasks"
    if not folder.is_dir():
        pytest.skip("the tasks are not on this machine")
    found = read_mixed(f"{folder}/*.test.jsonl")
    assert len(found.tasks) == len(list(folder.glob("*.test.jsonl")))
    assert Counter(one.task for one in found.sample(20).rows).most_common(1)[0][1] == 20


# -- sets ------------------------------------------------------------------------------------------------------


def test_a_task_has_one_domain_and_one_metric() -> None:
    with pytest.raises(ConfigurationError, match="task 'sum' has two domains, 'math' and 'fun'"):
        MixedSet((MixedRow(**row(1)), MixedRow(**row(2, domain="fun"))))
    with pytest.raises(ConfigurationError, match="task 'sum' has two metrics"):
        MixedSet((MixedRow(**row(1)), MixedRow(**row(2, metric="f1"))))


def test_a_sample_has_so_many_of_each_task_and_is_shuffled() -> None:
    drawn = many("a", "b", "c").sample(10, seed=3)
    assert Counter(one.task for one in drawn.rows) == {"a": 10, "b": 10, "c": 10}
    assert len({one.inputs for one in drawn.rows}) == 30
    turns = sum(one.task != other.task for one, other in zip(drawn.rows, drawn.rows[1:], strict=False))
    assert turns > 10, "the tasks stand mixed"
    assert [one.inputs for one in drawn.rows if one.task == "a"] != [f"a {number}?" for number in range(10)]


def test_a_sample_is_the_same_for_the_same_seed_whatever_the_order_and_the_other_tasks() -> None:
    asked = many("a", "b")
    drawn = asked.sample(5, seed=1)
    assert MixedSet(asked.rows[::-1]).sample(5, seed=1) == drawn
    assert set(many("b", "z").sample(5, seed=1).of(["b"]).rows) == set(drawn.of(["b"]).rows)
    assert set(asked.sample(5, seed=2).rows) != set(drawn.rows)
    assert set(drawn.rows) < set(asked.sample(9, seed=1).rows)


def test_a_sample_is_fair() -> None:
    seen = Counter(one.inputs for seed in range(400) for one in many("a", count=10).sample(3, seed).rows)
    assert all(80 < count < 160 for count in seen.values()), "120 each are expected"
    first = Counter(many("a", count=10).sample(10, seed).rows[0].inputs for seed in range(400))
    assert all(15 < first[f"a {number}?"] < 75 for number in range(10)), "40 each are expected"


def test_a_question_that_stands_twice_is_drawn_once_and_small_tasks_give_what_they_have() -> None:
    twice = MixedSet((MixedRow(**row(1)), MixedRow(**row(1, inputs="SUM  1?")), MixedRow(**row(2))))
    assert len(twice.sample(20)) == 2
    with pytest.raises(ConfigurationError, match="per_task=0"):
        twice.sample(0)


def test_what_was_learned_from_can_be_left_out() -> None:
    asked = many("a", count=4)
    learned = MixedSet((MixedRow("  A 2? ", "2", "a", "math", "em"),))
    assert [one.inputs for one in asked.without(learned).rows] == ["a 0?", "a 1?", "a 3?"]
    assert asked.without(MixedSet(())) == asked


def test_the_digest_tells_sets_apart() -> None:
    asked = many("a", count=3)
    digests = {asked.digest, MixedSet(asked.rows[::-1]).digest, MixedSet(asked.rows[:2]).digest, MixedSet(()).digest}
    digests.add(MixedSet((MixedRow("a 0?", "0", "a", "math", "f1"), *asked.rows[3:])).digest)
    assert len(digests) == 5
    assert asked.digest == many("a", count=3).digest
    assert len(asked.digest) == 64


# -- Hub datasets ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(token="hf_TheSecretOfAnn") as hub:
        yield hub


def load(hub: LocalHub, tmp_path: Path, **options: Any) -> list[str]:
    found = load_mixed_hub("ann/asked", endpoint=hub.url, cache_dir=tmp_path / "cache", **options)
    return [one.inputs for one in found.rows]


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows)).to_parquet(path)
    return path


@pytest.mark.parametrize(
    "name", ["test.jsonl", "data/sum.test.jsonl", "data/test-00000-of-00001.jsonl", "test/0000.jsonl"]
)
def test_a_dataset_gives_the_files_that_name_the_split(name: str, hub: LocalHub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data / name, row(1))
    write(data / "train.jsonl", row(2))
    write(data / "latest_news.jsonl", row(3))
    write(data / "test_cases" / "train.jsonl", row(4))
    hub.publish_dataset("ann/asked", data)
    assert load(hub, tmp_path) == ["sum 1?"]
    assert "sum 2?" in load(hub, tmp_path, split="train")


def test_a_dataset_may_be_json_or_parquet_and_is_read_in_one_form(hub: LocalHub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    table(data / "data" / "test-00000-of-00002.parquet", row(1), row(2))
    table(data / "data" / "test-00001-of-00002.parquet", row(3))
    hub.publish_dataset("ann/asked", data)
    assert load(hub, tmp_path) == ["sum 1?", "sum 2?", "sum 3?"]
    (data / "test.json").write_text(json.dumps([row(1), row(2)]))
    (data / "dataset_infos.json").write_text("{}")
    hub.publish_dataset("ann/asked", data)
    assert load(hub, tmp_path) == ["sum 1?", "sum 2?"]


def test_a_dataset_is_read_at_its_revision_with_columns_of_its_own(hub: LocalHub, tmp_path: Path) -> None:
    data = tmp_path / "data"
    table(data / "validation.parquet", {"question": "Old?", "label": "yes"})
    old = hub.publish_dataset("ann/asked", data)
    table(data / "validation.parquet", {"question": "New?", "label": "no"})
    hub.publish_dataset("ann/asked", data)
    shape: dict[str, Any] = {
        "split": "validation",
        "columns": {"inputs": "question", "targets": "label"},
        "task": "yes-no",
        "domain": "qa",
        "metric": "em",
    }
    assert load(hub, tmp_path, **shape) == ["New?"]
    assert load(hub, tmp_path, revision=old, **shape) == ["Old?"]
    with pytest.raises(RevisionNotFoundError):
        load(hub, tmp_path, revision="none", **shape)


def test_a_private_dataset_needs_its_token(hub: LocalHub, tmp_path: Path) -> None:
    write(tmp_path / "data" / "test.jsonl", row(1))
    hub.publish_dataset("ann/asked", tmp_path / "data", private=True)
    with pytest.raises(RepoNotFoundError):
        load(hub, tmp_path)
    assert load(hub, tmp_path, token=hub.token) == ["sum 1?"]


def test_a_bad_row_of_a_dataset_is_told_by_its_file(hub: LocalHub, tmp_path: Path) -> None:
    table(tmp_path / "data" / "test.parquet", row(1), row(2) | {"targets": None})
    hub.publish_dataset("ann/asked", tmp_path / "data")
    with pytest.raises(ConfigurationError, match=r"ann/asked/test\.parquet, row 2: 'targets' is a NoneType"):
        load(hub, tmp_path)
    with pytest.raises(ConfigurationError, match=r"no \.jsonl, \.json, \.parquet file of the split 'dev'"):
        load(hub, tmp_path, split="dev")
