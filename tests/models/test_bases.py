from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models import BaseModels, resolve_model
from lora_hub_sdk.models.names import SMOLLM2
from lora_hub_sdk.testing import LocalHub, tiny_base


def test_a_folder_stands_for_itself_without_evidence(base: Path) -> None:
    assert BaseModels().name(base, known=lambda: ["user/other"]) == str(base.resolve())


def test_a_folder_that_was_named_is_that_model(base: Path) -> None:
    bases = BaseModels({"meta/llama": base})
    assert bases.name(base) == bases.name("meta/llama") == "meta/llama"
    resolved = bases.resolve("meta/llama")
    assert (resolved.id, resolved.folder) == ("meta/llama", base.resolve())


def test_a_named_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="meta/llama"):
        BaseModels({"meta/llama": tmp_path / "none"})


def test_a_copy_is_known_by_its_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with LocalHub() as server:
        server.publish("user/tiny", base)
        snapshot = resolve_model("user/tiny", endpoint=server.url).folder
    bases = BaseModels()
    assert bases.name(snapshot) == "user/tiny"  # by its place in the cache
    copy = shutil.copytree(base, tmp_path / "copy")
    assert bases.name(copy, known=lambda: ["user/none", "user/tiny"]) == "user/tiny"
    other = tiny_base(tmp_path / "other", seed=8)
    assert bases.name(other, known=lambda: ["user/tiny"]) == str(other)


def test_a_copy_of_the_embedded_model_is_known(tmp_path: Path) -> None:
    copy = shutil.copytree(resolve_model("smollm2-135m-instruct").folder, tmp_path / "smol")
    assert BaseModels().name(copy, known=lambda: [SMOLLM2.hub_id]) == SMOLLM2.hub_id
