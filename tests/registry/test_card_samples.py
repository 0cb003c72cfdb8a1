"""Samples that a card shows, or that stand in the data it names on a local Hub."""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.registry import card_samples as module
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.registry.card_samples import CardSamples, card_samples
from lora_hub_sdk.testing import LocalHub

TOKEN = "hf_TheSecretOfAnn"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(token=TOKEN) as hub:
        yield hub


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def card(folder: Path, header: str, body: str = "# An adapter\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{header}\n---\n{body}", encoding="utf-8")
    return folder


def data(folder: Path, **files: str | bytes) -> Path:
    """A dataset's folder; a double underscore is a slash, a single one a dot."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def from_dataset(hub: LocalHub, tmp_path: Path, **files: str | bytes) -> CardSamples:
    hub.publish_dataset("ann/data", data(tmp_path / "data", **files))
    return card_samples(card(tmp_path / "adapter", "datasets: [ann/data]"), endpoint=hub.url)


# -- the card's own examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widget", "texts"),
    [
        ("- text: Is it good?\n- text: '  '\n- text: Is it good?\n- text: Or bad?", ("Is it good?", "Or bad?")),
        ("- messages: [{role: system, content: Be kind.}, {role: user, content: Hello}]", ("Hello",)),
        ("- text: Hello\n  output: {text: Bye}\n- output: {text: alone}", ("Hello",)),
        ("- Hello", ("Hello",)),
        ("Hello", ("Hello",)),
        ("- question: Where?\n  context: Here.", ("Where?",)),
        ("- text: [1, 2]\n- 7\n- messages: 7\n- {text: Hello}\n- [text]", ("Hello",)),
        ("7", ()),
    ],
)
def test_the_widget_gives_its_prompts_and_never_its_answers(
    tmp_path: Path, widget: str, texts: tuple[str, ...]
) -> None:
    block = "\n".join(f"  {line}" for line in widget.splitlines())
    found = card_samples(card(tmp_path, f"widget:\n{block}"), offline=True)
    assert found == CardSamples(texts, "the card's widget" if texts else "")


def test_a_card_with_examples_asks_nobody(hub: LocalHub, tmp_path: Path) -> None:
    folder = card(tmp_path, "widget: [{text: Hello}]\ndatasets: [ann/data]")
    assert card_samples(folder, endpoint=hub.url).texts == ("Hello",)
    assert hub.requests == []


def test_offline_asks_nobody(hub: LocalHub, tmp_path: Path) -> None:
    assert card_samples(card(tmp_path, "datasets: [ann/data]"), endpoint=hub.url, offline=True) == CardSamples()
    assert hub.requests == []


def test_no_card_is_no_trouble(tmp_path: Path) -> None:
    assert card_samples(tmp_path) == card_samples(tmp_path / "nowhere") == CardSamples()


# -- rows of a dataset ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"inputs": "a", "input": "b", "prompt": "c"}, "a"),
        ({"Prompt": "c", "text": "d", "completion": "x"}, "c"),
        ({"input": " ", "question": "q", "text": "d"}, "q"),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n1 and 2"),
        ({"instruction": "Sing.", "input": "", "output": "la"}, "Sing."),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, "u"),
        ({"conversations": [{"from": "gpt", "value": "g"}, {"from": "human", "value": "h"}]}, "h"),
        ({"prompt": [{"role": "user", "content": "u"}]}, "u"),
        ({"text": "x" * 9000}, "x" * 4000),
    ],
)
def test_each_form_of_a_row_gives_its_prompt(hub: LocalHub, tmp_path: Path, row: dict[str, Any], text: str) -> None:
    assert from_dataset(hub, tmp_path, train_jsonl=lines(row)).texts == (text,)


ROWS = [{"text": f"row {number}", "label": str(number % 2)} for number in range(100)]
EXPECTED = tuple(f"row {number}" for number in range(0, 100, 5))


@pytest.mark.parametrize(
    "files",
    [
        {"data__train_jsonl": lines(*ROWS)},
        {"train_json": json.dumps(ROWS)},
        {"train_json": json.dumps({"version": 1, "data": ROWS})},
        {"train_json": lines(*ROWS)},
        {"train_csv": "\ufeff" + table(ROWS)},
        {"train_tsv": table(ROWS, "\t")},
    ],
)
def test_twenty_rows_spread_over_the_file(hub: LocalHub, tmp_path: Path, files: dict[str, str]) -> None:
    found = from_dataset(hub, tmp_path, **files)
    assert found.texts == EXPECTED
    (path,) = [path for _, path in hub.requests if "/resolve/" in path]
    sha = path.split("/resolve/")[1][:40]
    assert found.source == f"dataset ann/data at {sha[:12]}, {path.split(sha + '/')[1]}"


def test_parquet_is_read_where_pyarrow_is_installed(hub: LocalHub, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(ROWS), stream)
    assert from_dataset(hub, tmp_path, train_parquet=stream.getvalue()).texts == EXPECTED


def test_parquet_without_pyarrow_is_a_note(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with caplog.at_level(logging.INFO, module.__name__):
        assert from_dataset(hub, tmp_path, train_parquet=b"PAR1") == CardSamples()
    assert "pyarrow" in caplog.text


def test_training_files_come_first_and_tests_never(hub: LocalHub, tmp_path: Path) -> None:
    row = {name: lines({"text": name}) for name in ("a_jsonl", "test_jsonl", "z__train-00_jsonl", "dataset.infos_json")}
    found = from_dataset(hub, tmp_path, **row)
    assert found.texts == ("z__train-00_jsonl",)
    asked = [path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path]
    assert asked == ["train-00.jsonl"]


def test_only_tests_give_nothing(hub: LocalHub, tmp_path: Path) -> None:
    assert from_dataset(hub, tmp_path, test_jsonl=lines({"text": "a"}), data__dev_csv="text\na\n") == CardSamples()


def test_a_file_that_cannot_be_read_leaves_the_next_its_turn(hub: LocalHub, tmp_path: Path) -> None:
    broken, good = b'{"text": "a"\n\xff', lines({"text": "good"})
    assert from_dataset(hub, tmp_path, train1_jsonl=broken, train2_jsonl=good).texts == ("good",)


def test_a_dataset_that_gives_nothing_leaves_the_next_its_turn(hub: LocalHub, tmp_path: Path) -> None:
    hub.publish_dataset("ann/data", data(tmp_path / "data", train_jsonl=lines({"text": "good"})))
    folder = card(tmp_path / "adapter", "datasets: [../../x, https://host/x, ann/missing, ann/data]")
    assert card_samples(folder, endpoint=hub.url) == CardSamples()  # no more than three are asked for
    folder = card(tmp_path / "adapter", "datasets: [../../x, ann/missing, ann/data]")
    assert card_samples(folder, endpoint=hub.url).texts == ("good",)


# -- what must cost nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff" * 1000,
        b"[" * 200_000,
        b"{" * 200_000,
        b"null\n1\n[]\n",
        b'{"text": NaN}\n',
        b'{"messages": [[[]], {"role": ["user"]}]}',
        b'{"text": {"a": 1}}',
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_strange_content_gives_no_samples_and_no_error(
    hub: LocalHub, tmp_path: Path, content: bytes, form: str
) -> None:
    assert from_dataset(hub, tmp_path, **{f"train_{form}": content}).texts == ()


def test_files_over_the_limit_are_not_asked_for(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FILE", 1000)
    large, small = lines(*[{"text": "x" * 99}] * 20), lines({"text": "small"})
    assert from_dataset(hub, tmp_path, train0_jsonl=large, train1_jsonl=small).texts == ("small",)
    assert not [path for _, path in hub.requests if "train0" in path]


def test_a_file_larger_than_listed_is_cut_off(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_training_files", lambda listing: ["train.jsonl"])
    monkeypatch.setattr(module, "_MAX_FILE", 1000)
    assert from_dataset(hub, tmp_path, train_jsonl=lines(*[{"text": "x" * 99}] * 20)) == CardSamples()


def test_hostile_names_are_never_asked_for(hub: LocalHub, tmp_path: Path) -> None:
    row = lines({"text": "stolen"}).encode()
    hostile = {"../../train.jsonl": row, "/etc/train.jsonl": row, "a/../../train.jsonl": row}
    hub.publish_dataset("ann/data", data(tmp_path / "data", test_csv="text\na\n"), hostile=hostile)
    found = card_samples(card(tmp_path / "adapter", "datasets: ann/data"), endpoint=hub.url)
    assert found == CardSamples()
    assert not [path for _, path in hub.requests if "train" in path]


@pytest.mark.parametrize("trouble", ["missing", "private", "gated", "down", "broken-off", "closed"])
def test_an_unreachable_dataset_is_a_note_without_the_token(
    hub: LocalHub, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    folder = data(tmp_path / "data", train_jsonl=lines({"text": "a"}))
    if trouble != "missing":
        hub.publish_dataset("ann/data", folder, private=trouble == "private", gated=trouble == "gated")
    url = hub.url
    if trouble == "down":
        hub.fail("datasets/ann/data", status=503)
    if trouble == "broken-off":
        hub.truncate("datasets/ann/data", "train.jsonl", keep=3)
    if trouble == "closed":
        hub.close()
    adapter = card(tmp_path / "adapter", "datasets: [ann/data]")
    with caplog.at_level(logging.INFO, module.__name__):
        assert card_samples(adapter, endpoint=url, token="hf_AnotherSecret", timeout=5) == CardSamples()
    assert "ann/data" in caplog.text
    assert "hf_AnotherSecret" not in caplog.text


def test_a_private_dataset_opens_with_the_token(hub: LocalHub, tmp_path: Path) -> None:
    hub.publish_dataset("ann/data", data(tmp_path / "data", train_jsonl=lines({"text": "a"})), private=True)
    assert card_samples(card(tmp_path / "c", "datasets: [ann/data]"), endpoint=hub.url, token=TOKEN).texts == ("a",)


# -- the card itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "summary"),
    [
        ("# Title\n\nTells good reviews\nfrom bad ones.\n\nMore.", "Tells good reviews from bad ones."),
        (
            "# Title\n<!-- Provide a\n\nquick summary. -->\n[More Information Needed]\n\n## Use\n\nFor mails.",
            "For mails.",
        ),
        (
            "```python\nimport peft as it\n```\n| a table | b |\n\n![an image](x.png)\n\nReal prose here.",
            "Real prose here.",
        ),
        ("", None),
        ("word " * 1000, ("word " * 200)),
    ],
)
def test_the_summary_is_the_first_prose(tmp_path: Path, body: str, summary: str | None) -> None:
    assert read_card(card(tmp_path, "license: mit", body) / "README.md").summary == summary


@pytest.mark.parametrize("unit", ["![", "<", "\n ", "`", "<!--", "\n|", "a", "![](", "- ", "\t"])
def test_no_text_holds_the_reader_up(tmp_path: Path, unit: str) -> None:
    (tmp_path / "README.md").write_text(unit * 1_000_000)
    assert read_card(tmp_path / "README.md").widget == ()
