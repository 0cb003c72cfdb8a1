from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.errors import InvalidConfigError, OutOfBoundsError, UnsupportedFeatureError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.registry.adapter_tokens import LARGEST, check_tokens, own_template
from lora_hub_sdk.registry.source import HubSource
from lora_hub_sdk.testing import LocalHub, tiny_adapter, tiny_base

#: The tiny base's vocabulary has so many tokens: <pad>, <eos> and the bytes.
ROWS = 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def bring(folder: Path, added: dict[int, str] | None = None, **fields: Any) -> Path:
    """An adapter's folder with such a tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    decoder = {str(place): {"content": content, "special": True} for place, content in (added or {}).items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **fields}))
    return folder


def check(adapter: Path, base: Path) -> None:
    check_tokens(adapter, lambda: base, "ann/lora")


def test_an_adapter_without_a_tokenizer_asks_nothing_of_the_base(tmp_path: Path) -> None:
    def refuse() -> Path:
        raise AssertionError

    check_tokens(tmp_path, refuse, "ann/lora")


@pytest.mark.parametrize("added", [{0: "<pad>", 1: "<eos>"}, {1: "<eos>"}, {70: "g"}])
def test_the_bases_own_tokens_pass(added: dict[int, str], folder: Path, tmp_path: Path) -> None:
    if 70 in added:
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        added = {vocabulary["g"]: "g"}
    check(bring(tmp_path / "a", added), folder)


@pytest.mark.parametrize("added", [{ROWS: "<tool>"}, {1: "<end>"}, {0: "<pad>", ROWS + 1: "<x>"}])
def test_other_tokens_are_refused_by_name(added: dict[int, str], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"'ann/lora'.*added tokens.*<(tool|end|x)>"):
        check(bring(tmp_path / "a", added), folder)


@pytest.mark.parametrize("pad", ["[PAD]", {"content": "[PAD]"}])
def test_a_token_for_padding_passes_as_nothing_looks_at_it(pad: object, folder: Path, tmp_path: Path) -> None:
    check(bring(tmp_path / "a", {ROWS: "[PAD]"}, pad_token=pad), folder)
    with pytest.raises(UnsupportedFeatureError):
        check(bring(tmp_path / "b", {ROWS: "[PAD]", ROWS + 1: "[X]"}, pad_token=pad), folder)


def test_without_the_bases_tokenizer_its_number_of_rows_decides(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((folder / "config.json").read_text())
    check(bring(tmp_path / "a", {1: "<other>"}), bare)
    with pytest.raises(UnsupportedFeatureError, match="<tool>"):
        check(bring(tmp_path / "b", {ROWS: "<tool>"}), bare)


@pytest.mark.parametrize(
    "content", [b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"added_tokens_decoder": {"' + b"9" * 5000 + b'": "x"}}']
)
def test_files_that_make_no_sense_are_refused_or_say_nothing(content: bytes, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    if b"9" in content:
        check(tmp_path, folder)
        return
    with pytest.raises(InvalidConfigError, match=r"tokenizer_config\.json"):
        check(tmp_path, folder)


def test_a_file_that_is_too_large_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (LARGEST + 1))
    with pytest.raises(OutOfBoundsError, match=r"chat_template\.jinja"):
        own_template(tmp_path, "ann/lora")


def test_a_template_is_found_in_either_file_and_the_separate_one_counts(tmp_path: Path) -> None:
    assert own_template(tmp_path, "a") is None
    assert own_template(bring(tmp_path / "none"), "a") is None
    assert own_template(bring(tmp_path / "one", chat_template="{{ 1 }}"), "a") == "{{ 1 }}"
    several = [{"name": "tool_use", "template": "{{ 2 }}"}, {"name": "default", "template": "{{ 3 }}"}]
    folder = bring(tmp_path / "several", chat_template=several)
    assert own_template(folder, "a") == "{{ 3 }}"
    (folder / "chat_template.jinja").write_text("{{ 4 }}")
    assert own_template(folder, "a") == "{{ 4 }}"


def test_a_pulled_adapter_comes_with_what_it_says_of_its_tokenizer(tmp_path: Path) -> None:
    repository = bring(tmp_path / "repos" / "ann" / "lora", {1: "<eos>"})
    tiny_adapter(repository, tiny_base(tmp_path / "base"))
    (repository / "chat_template.jinja").write_text("{{ 1 }}")
    (repository / "tokenizer.json").write_text("{}")
    with LocalHub(tmp_path / "repos") as hub:
        pulled = HubSource(endpoint=hub.url, token=False, cache_dir=tmp_path / "cache").pull("ann/lora")
        assert own_template(pulled.folder, "ann/lora") == "{{ 1 }}"
        assert sorted(path.name for path in pulled.folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "tokenizer_config.json",
        ]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_file_that_is_too_large_is_not_pulled(name: str, tmp_path: Path) -> None:
    repository = tiny_adapter(tmp_path / "repos" / "ann" / "lora", tiny_base(tmp_path / "base"))
    (repository / name).write_bytes(b" " * (LARGEST + 1))
    with LocalHub(tmp_path / "repos") as hub:
        source = HubSource(endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
        with pytest.raises(OutOfBoundsError, match=name):
            source.pull("ann/lora")


def test_a_hub_refuses_and_reports_added_tokens(hub: LoraHub, folder: Path, tmp_path: Path) -> None:
    adapter = bring(tiny_adapter(tmp_path / "lora", folder), {ROWS: "<tool>"})
    with pytest.raises(UnsupportedFeatureError, match=r"added tokens.*<tool>"):
        hub.register(adapter, samples=["a text"])
    report = hub.inspect(adapter)
    assert (report.accepted, report.error) == (False, "UnsupportedFeatureError")
    (failed,) = [check for check in report.checks if check.passed is False]
    assert failed.name == "features"
    assert "<tool>" in failed.detail
