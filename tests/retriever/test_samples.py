from __future__ import annotations

import io
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.retriever import samples as module
from lora_hub_sdk.retriever.samples import read_samples, sample_texts

SECRET = "call 555-0123"


def test_texts_and_rows_in_order_without_blanks_and_repetitions() -> None:
    given: list[Any] = ["b", {"inputs": " a ", "targets": "x"}, "", "b", "  ", {"inputs": "c"}]
    assert sample_texts(given, "mine") == ("b", "a", "c")


def test_a_generator_is_read_once() -> None:
    assert sample_texts((text for text in ("a", "b")), "mine") == ("a", "b")


@pytest.mark.parametrize(
    "samples", [[], ["", "  "], [{"inputs": ""}], "one string", b"x", {"inputs": "x"}, [7], [{"text": "x"}], [None]]
)
def test_anything_else_is_refused(samples: Any) -> None:
    with pytest.raises(SamplesError, match="mine"):
        sample_texts(samples, "mine")


def test_the_first_spelling_of_a_repeated_text_stays() -> None:
    given = ["Is it  GOOD?", "is it good?", " Is\tit\ngood? ", "STRASSE", "straße", "Is it bad?"]
    assert sample_texts(given, "mine") == ("Is it  GOOD?", "STRASSE", "Is it bad?")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\0b", "a\ufffdb"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00a", "\ufffda"),
        ("\ud83d\ude00", "😀"),
        ("😀 ü", "😀 ü"),
        ("\udc80\ud800", "\ufffd\ufffd"),
    ],
)
def test_what_no_database_can_hold_is_replaced(text: str, kept: str) -> None:
    assert sample_texts([text], "mine") == (kept,)
    kept.encode("utf-8")


# -- redaction -----------------------------------------------------------------------------------------------


def test_redact_sees_each_text_as_given_and_what_it_gives_is_treated_like_any_text() -> None:
    seen: list[str] = []

    def redact(text: str) -> str:
        seen.append(text)
        return text.replace("555", "\0")

    assert sample_texts([" 555 ", "", "a", "A", {"inputs": "555"}], "mine", redact=redact) == ("\ufffd", "a")
    assert seen == [" 555 ", "", "a", "A", "555"]


def test_texts_that_redaction_makes_alike_are_one() -> None:
    assert sample_texts(["x 1", "x 2"], "mine", redact=lambda text: text[:1]) == ("x",)


def test_redaction_that_leaves_nothing_is_told() -> None:
    with pytest.raises(SamplesError, match="none with any text"):
        sample_texts([SECRET], "mine", redact=lambda text: "")


def broken(text: str) -> str:
    raise ValueError(f"cannot read {text}")


@pytest.mark.parametrize("redact", [broken, lambda text: None, lambda text: [text], lambda text: text.encode()])
def test_a_redact_that_fails_stops_everything_and_quotes_nothing(redact: Callable[[str], Any]) -> None:
    with pytest.raises(SamplesError, match=r"redact .* sample 0") as caught:
        sample_texts([SECRET], "mine", redact=redact)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("sample", [[SECRET], {"text": SECRET}, {SECRET: 1}, 5550123])
def test_a_sample_of_another_form_is_not_quoted(sample: Any) -> None:
    with pytest.raises(SamplesError) as caught:
        sample_texts(["a", sample], "mine")
    assert "sample 1" in str(caught.value)
    assert "555" not in str(caught.value)


# -- files and streams ---------------------------------------------------------------------------------------


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('"a"\n\n{"inputs": "b", "targets": "x"}\r\n"with\u2028in"\n', encoding="utf-8-sig")
    assert sample_texts(file, "mine") == ("a", "b", "with\u2028in")
    assert read_samples(str(file)) == ["a", {"inputs": "b", "targets": "x"}, "with\u2028in"]


def test_a_file_of_plain_lines(tmp_path: Path) -> None:
    file = tmp_path / "samples.TXT"
    file.write_text('a\n\n  \n"b"\n')
    assert sample_texts(file, "mine") == ("a", '"b"')


def test_a_stream_holds_json_lines() -> None:
    assert read_samples(io.StringIO('"a"\n{"inputs": "b"}')) == ["a", {"inputs": "b"}]
    assert read_samples(io.StringIO("")) == []


def test_a_file_is_redacted_too(tmp_path: Path) -> None:
    file = tmp_path / "samples.txt"
    file.write_text(SECRET)
    assert sample_texts(file, "mine", redact=lambda text: text.replace("555-0123", "...")) == ("call ...",)


@pytest.mark.parametrize("line", ["7", "null", '["a"]', "{", f"{SECRET}", '"a" "b"', "[" * 100_000])
def test_a_line_that_is_no_sample_is_told_by_its_number_alone(tmp_path: Path, line: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(f'"fine"\n\n{line}\n')
    with pytest.raises(ConfigurationError, match=r"samples\.jsonl', line 3") as caught:
        sample_texts(file, "mine")
    assert SECRET not in "".join(traceback.format_exception(caught.value, limit=0))


def test_what_cannot_be_read_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'"\xff"')
    for path in (tmp_path / "none", tmp_path, tmp_path / "latin", Path("nul\0l")):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            sample_texts(path, "mine")


def test_no_more_than_a_bounded_size_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_SIZE", 100)
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps("x" * 98))
    assert sample_texts(file, "mine") == ("x" * 98,)
    file.write_text(json.dumps("x" * 99))
    for source in (file, io.StringIO(file.read_text())):
        with pytest.raises(ConfigurationError, match="more than 100"):
            read_samples(source)
