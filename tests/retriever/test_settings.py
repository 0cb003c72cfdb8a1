from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.settings import (
    INSTRUCTION,
    SETTINGS_FILE,
    RetrieverSettings,
    read_settings,
    write_settings,
)


def test_a_folder_without_settings_has_the_defaults(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == RetrieverSettings(INSTRUCTION, None, 0, rerank=False, min_score=None)


@pytest.mark.parametrize(
    "settings",
    [
        RetrieverSettings(),
        RetrieverSettings(instruction="", max_tokens=128, tail_tokens=32, rerank=True, min_score=0.25),
        RetrieverSettings(instruction='Überschrift "日本"\n', min_score=-1),
    ],
)
def test_what_is_written_is_read_again(tmp_path: Path, settings: RetrieverSettings) -> None:
    write_settings(tmp_path, RetrieverSettings(instruction="before"))
    write_settings(tmp_path, settings)
    assert read_settings(tmp_path) == settings
    assert os.listdir(tmp_path) == [SETTINGS_FILE]


def test_the_file_is_sorted_json_with_its_version_and_as_readable_as_any_other(tmp_path: Path) -> None:
    write_settings(tmp_path, RetrieverSettings(rerank=True))
    (tmp_path / "other").touch()
    found = json.loads((tmp_path / SETTINGS_FILE).read_text())
    assert found == {"version": 1, "instruction": INSTRUCTION, "max_tokens": None} | {
        "tail_tokens": 0,
        "rerank": True,
        "min_score": None,
    }
    assert list(found) == sorted(found)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (SETTINGS_FILE, "other")]
    assert modes[0] == modes[1]


def test_a_field_that_the_file_lacks_has_its_default(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text('{"version": 1, "max_tokens": 64}')
    assert read_settings(tmp_path) == RetrieverSettings(max_tokens=64)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "no JSON object"),
        (b"{}", "version None"),
        (b'{"version": 2}', "version 2, this package reads version 1"),
        (b'{"version": true}', "version True"),
        (b'{"version": 1, "colour": "red"}', "unknown fields: colour"),
        (b'{"version": 1, "min_score": NaN}', "min_score=nan"),
        (b'{"version": 1, "rerank": 1}', "rerank=1"),
        (b'{"version": 1, "instruction": "\\ud800"}', "instruction="),
    ],
)
def test_a_damaged_file_is_told_with_its_place_and_a_way_out(tmp_path: Path, text: bytes, told: str) -> None:
    (tmp_path / SETTINGS_FILE).write_bytes(text)
    with pytest.raises(ConfigurationError, match=told) as caught:
        read_settings(tmp_path)
    assert str(tmp_path / SETTINGS_FILE) in str(caught.value)
    assert "again" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"instruction": None},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"tail_tokens": -1},
        {"tail_tokens": None},
        {"max_tokens": 64, "tail_tokens": 64},
        {"rerank": None},
        {"min_score": 1.5},
        {"min_score": False},
        {"min_score": "0.5"},
        {"min_score": float("inf")},
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=list(values)[-1]):
        RetrieverSettings(**values)


def test_a_folder_that_is_not_there_is_told_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_settings(tmp_path / "none", RetrieverSettings())
