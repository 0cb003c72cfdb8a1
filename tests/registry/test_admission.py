from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub_sdk.engine.shapes import module_shapes
from lora_hub_sdk.errors import (
    AdmissionError,
    DamagedWeightsError,
    MissingWeightsError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnmatchedTensorsError,
    UnsafeWeightsError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry.admission import Admitted, Limits, admit
from lora_hub_sdk.testing import tiny_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter(tmp_path / "lora", base, rank=4)


def check(folder: Path, base: Path, **options: Any) -> Admitted:
    return admit(folder, source="mine", shapes=module_shapes(base), **options)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_a_good_adapter_is_described(folder: Path, base: Path) -> None:
    admitted = check(folder, base)
    assert admitted.max_rank == 4
    assert admitted.target_modules == ("q_proj", "v_proj")
    assert len(admitted.modules) == 4
    assert admitted.size_bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_the_digest_follows_weights_and_configuration(folder: Path, base: Path) -> None:
    first = check(folder, base).digest
    assert check(folder, base).digest == first
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, "lora_alpha": 9.0}))
    second = check(folder, base).digest
    rewrite(folder, lambda tensors: tensors[f"{Q}.lora_A.weight"].mul_(2))
    assert len({first, second, check(folder, base).digest}) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_refused(folder: Path, base: Path, value: float, dtype: torch.dtype) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[f"{Q}.lora_B.weight"].to(dtype)
        tensor[-1, -1] = value
        tensors[f"{Q}.lora_B.weight"] = tensor

    rewrite(folder, poison)
    with pytest.raises(NonFiniteWeightsError, match="lora_B"):
        check(folder, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_but_finite_values_are_accepted(folder: Path, base: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.full((4, 32), torch.finfo(dtype).max)}))
    assert check(folder, base)


def test_a_rank_other_than_the_configured_is_refused(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(5, 32)}))
    with pytest.raises(ShapeMismatchError, match=r"\[5, 32\], expected \[4, 32\]"):
        check(folder, base)


def test_a_shape_other_than_the_bases_is_refused(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.lora_B.weight": torch.zeros(31, 4)}))
    with pytest.raises(ShapeMismatchError):
        check(folder, base)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.query.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "something.else",
    ],
)
def test_tensors_that_match_nothing_are_listed(folder: Path, base: Path, key: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    with pytest.raises(UnmatchedTensorsError) as caught:
        check(folder, base)
    assert caught.value.keys == (key,)


@pytest.mark.parametrize(
    ("key", "feature"),
    [
        (f"{Q}.lora_magnitude_vector", "DoRA"),
        (f"{Q}.lora_B.bias", "lora_bias"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.lm_head.modules_to_save.weight", "modules_to_save"),
    ],
)
def test_tensors_of_unsupported_features_are_named(folder: Path, base: Path, key: str, feature: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(4)}))
    with pytest.raises(UnsupportedFeatureError, match=feature):
        check(folder, base)


def test_half_a_pair_is_refused(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(f"{Q}.lora_B.weight"))
    with pytest.raises(UnmatchedTensorsError, match="only one of"):
        check(folder, base)


def test_no_tensors_at_all_are_refused(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors.clear())
    with pytest.raises(UnmatchedTensorsError, match="no LoRA tensors"):
        check(folder, base)


def test_integers_are_refused(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}))
    with pytest.raises(UnsupportedFeatureError, match="dtype"):
        check(folder, base)


def test_pickles_are_refused_unread(folder: Path, base: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingWeightsError):
        check(folder, base)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UnsafeWeightsError, match=r"adapter_model\.bin"):
        check(folder, base)


def test_limits_are_kept(folder: Path, base: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="size"):
        check(folder, base, limits=Limits(max_bytes=100))
    with pytest.raises(UnsupportedFeatureError, match="rank"):
        check(folder, base, limits=Limits(max_rank=3))


def test_every_truncation_and_flip_of_the_header_ends_in_a_named_error_or_a_good_adapter(
    folder: Path, base: Path
) -> None:
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedWeightsError):
            check(folder, base)
    for place in range(0, 600, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        # Whatever else is raised fails the test.
        with contextlib.suppress(AdmissionError):
            check(folder, base)
