from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_hub_sdk.models import weights_fingerprint


def write(folder: Path, **tensors: torch.Tensor) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return weights_fingerprint(folder)


def test_it_follows_names_shapes_and_values_of_every_tensor(tmp_path: Path) -> None:
    first = write(tmp_path / "a", x=torch.zeros(2, 3), y=torch.ones(4))
    assert write(tmp_path / "b", x=torch.zeros(2, 3), y=torch.ones(4)) == first
    others = {
        write(tmp_path / "c", x=torch.zeros(3, 2), y=torch.ones(4)),
        write(tmp_path / "c", z=torch.zeros(2, 3), y=torch.ones(4)),
        write(tmp_path / "c", x=torch.zeros(2, 3), y=torch.full((4,), 2.0)),
        write(tmp_path / "c", x=torch.zeros(2, 3).half(), y=torch.ones(4)),
    }
    assert len(others | {first}) == 5


def test_a_folder_without_weights_or_with_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weights_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        weights_fingerprint(tmp_path)
