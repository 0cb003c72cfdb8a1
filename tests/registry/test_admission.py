from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.errors import (
    AdmissionError,
    BaseModelMismatchError,
    DamagedWeightsError,
    MissingWeightsError,
    NoEffectError,
    NonFiniteWeightsError,
    OutOfBoundsError,
    ShapeMismatchError,
    UnmatchedTensorsError,
    UnsafeWeightsError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry.admission import Admitted, Limits, admit, check_base_model
from lora_hub_sdk.registry.inspection import Inspection, inspect_adapter
from lora_hub_sdk.testing import raw_factors, tiny_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    return tiny_adapter(tmp_path / "lora", base, rank=4)


def check(folder: Path, base: Path, **options: Any) -> Admitted:
    return admit(folder, source="mine", layout=module_layout(base), **options)


def inspect(folder: Path, base: Path, **options: Any) -> Inspection:
    return inspect_adapter(folder, source="mine", layout=module_layout(base), **options)


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


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
    configure(folder, lora_alpha=9.0)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_largest_value_of_float16_is_accepted_where_the_norm_may_be_so_large(
    folder: Path, base: Path, dtype: torch.dtype
) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.full((4, 32), 65504.0, dtype=dtype)}))
    assert check(folder, base, limits=Limits(max_delta_norm=1e9))
    with pytest.raises(OutOfBoundsError, match=r"norm of the delta of model\.layers\.0\.self_attn\.q_proj") as caught:
        check(folder, base)
    assert caught.value.limit == Limits().max_delta_norm
    assert caught.value.found > caught.value.limit


def test_a_value_that_float16_cannot_hold_is_refused(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors[f"{Q}.lora_A.weight"].view(-1)[7:8].fill_(-65520.0))
    with pytest.raises(OutOfBoundsError, match=r"largest value of .*q_proj\.lora_A\.weight is 65520"):
        check(folder, base)
    assert check(folder, base, limits=Limits(max_abs=1e5, max_delta_norm=1e9))


@pytest.mark.parametrize("alpha", [1e9, -1e9, 1e308])
def test_a_scale_beyond_the_limit_is_refused_and_negative_ones_count_as_well(
    folder: Path, base: Path, alpha: float
) -> None:
    configure(folder, lora_alpha=alpha)
    with pytest.raises(OutOfBoundsError, match=r"alpha / r of model\.layers\.0\.self_attn\.q_proj") as caught:
        check(folder, base)
    assert caught.value.found == abs(alpha) / 4


def test_an_adapter_that_subtracts_is_accepted(folder: Path, base: Path) -> None:
    norm = check(folder, base).max_delta_norm
    configure(folder, lora_alpha=-8)
    assert check(folder, base).max_delta_norm == norm


@pytest.mark.parametrize("what", ["alpha", "A", "B"])
def test_an_adapter_without_any_effect_is_refused(folder: Path, base: Path, what: str) -> None:
    if what == "alpha":
        configure(folder, lora_alpha=0)
    else:
        rewrite(folder, lambda tensors: [tensors[key].zero_() for key in tensors if f"lora_{what}" in key])
    with pytest.raises(NoEffectError, match="zero"):
        check(folder, base)


def test_one_module_with_an_effect_is_enough(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: [tensors[key].zero_() for key in tensors if "lora_B" in key and ".1." not in key])
    assert check(folder, base)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("rslora", [False, True])
def test_norms_are_those_of_the_dense_deltas(tmp_path: Path, base: Path, dtype: str, rslora: bool) -> None:
    folder = tiny_adapter(
        tmp_path / "lora", base, rank=6, dtype=dtype, rslora=rslora, modules=("q_proj", "down_proj"),
        rank_pattern={"down_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 1.5},
    )  # fmt: skip
    dense = [float((scale * b @ a).norm()) for a, b, scale in raw_factors(folder).values()]
    seen = inspect(folder, base)
    assert check(folder, base).max_delta_norm == pytest.approx(max(dense), rel=1e-5)
    assert seen.delta_norm_max == pytest.approx(max(dense), rel=1e-5)
    assert seen.delta_norm_median == pytest.approx(float(np.median(dense)), rel=1e-5)
    assert seen.delta_norm_min == pytest.approx(min(dense), rel=1e-5)


def test_a_norm_that_overflows_is_beyond_every_limit(folder: Path, base: Path) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"].fill_(1e30)
        tensors[f"{Q}.lora_B.weight"].fill_(1e30)[:, 1] = -1e30

    rewrite(folder, overflow)
    with pytest.raises(OutOfBoundsError, match="norm of the delta"):
        check(folder, base, limits=Limits(max_abs=float("inf")))


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


@pytest.mark.parametrize("name", ["Somebody/tiny", "somebody/Tiny", "somebody/tiny2", "tiny", "evil/somebody/tiny"])
def test_a_base_that_only_looks_like_the_one_asked_for_is_refused(folder: Path, base: Path, name: str) -> None:
    configure(folder, base_model_name_or_path=name)
    config = check(folder, base).config
    with pytest.raises(BaseModelMismatchError, match=name):
        check_base_model(config, "somebody/tiny", config.base_model, "mine")


def test_limits_are_kept(folder: Path, base: Path) -> None:
    with pytest.raises(OutOfBoundsError, match="size"):
        check(folder, base, limits=Limits(max_bytes=100))
    with pytest.raises(OutOfBoundsError, match="rank"):
        check(folder, base, limits=Limits(max_rank=3))
    with pytest.raises(OutOfBoundsError, match="alpha"):
        check(folder, base, limits=Limits(max_scale=1.9))
    with pytest.raises(OutOfBoundsError, match="norm"):
        check(folder, base, limits=Limits(max_delta_norm=1e-3))
    with pytest.raises(DamagedWeightsError, match="header"):
        check(folder, base, limits=Limits(header_bytes=100))


def test_a_file_larger_than_its_ranks_and_base_allow_is_refused_unread(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"more": torch.zeros(3 << 20)}))
    with pytest.raises(OutOfBoundsError, match="header_bytes"):
        check(folder, base)
    with pytest.raises(UnmatchedTensorsError):
        check(folder, base, limits=Limits(header_bytes=16 << 20))


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"target_modules": ["q_proj"]}, "v_proj"),
        ({"exclude_modules": ["layers.1.self_attn.v_proj"]}, "layers.1.self_attn.v_proj"),
        ({"layers_to_transform": [1]}, "layers.0.self_attn.q_proj"),
    ],
)
def test_tensors_that_the_configuration_leaves_out_are_refused(
    folder: Path, base: Path, changes: dict[str, Any], left_out: str
) -> None:
    configure(folder, **changes)
    with pytest.raises(UnmatchedTensorsError, match="leave out") as caught:
        check(folder, base)
    assert caught.value.keys[0].endswith(left_out)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": "(a+)+$"},
        {"target_modules": "((("},
        {"exclude_modules": ".*"},
        {"layers_to_transform": [0, 1, 7]},
    ],
)
def test_modules_without_tensors_and_expressions_that_never_run_are_no_contradiction(
    folder: Path, base: Path, changes: dict[str, Any]
) -> None:
    configure(folder, **changes)
    assert len(check(folder, base).modules) == 4


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


# -- inspection -----------------------------------------------------------------------------------------------------


def test_an_inspection_of_a_good_adapter_tells_all(folder: Path, base: Path) -> None:
    admitted, seen = check(folder, base), inspect(folder, base)
    assert seen.accepted
    assert (seen.error, seen.message) == (None, None)
    assert [check.name for check in seen.checks] == [
        "files", "configuration", "features", "tensors", "shapes", "finite", "bounds", "effect"
    ]  # fmt: skip
    assert all(check.passed and check.detail for check in seen.checks)
    assert (seen.base_model, seen.rank, seen.alpha, seen.use_rslora) == (str(base), 4, 8.0, False)
    assert (seen.modules, seen.target_modules) == (4, ("q_proj", "v_proj"))
    assert (seen.tensors, seen.dtypes) == (8, ("F32",))
    assert seen.parameters == sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert (seen.digest, seen.size_bytes, seen.delta_norm_max) == (
        admitted.digest, admitted.size_bytes, admitted.max_delta_norm
    )  # fmt: skip


def test_an_inspection_tells_how_far_it_came(folder: Path, base: Path) -> None:
    rewrite(folder, lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(float("nan")))
    seen = inspect(folder, base)
    assert {check.name: check.passed for check in seen.checks} == {
        "files": True, "configuration": True, "features": True, "tensors": True, "shapes": True,
        "finite": False, "bounds": None, "effect": None,
    }  # fmt: skip
    assert seen.error == "NonFiniteWeightsError"
    assert seen.message is not None
    assert seen.message.endswith(seen.checks[5].detail)
    assert (seen.modules, seen.dtypes) == (4, ("F32",))
    assert seen.digest is not None


def test_a_bound_met_before_the_weights_are_read_leaves_the_tensors_open(folder: Path, base: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 16 << 20)
    seen = inspect(folder, base)
    assert {check.name: check.passed for check in seen.checks if check.passed is not True} == {
        "tensors": None, "shapes": None, "finite": None, "bounds": False, "effect": None
    }  # fmt: skip
    assert (seen.rank, seen.tensors, seen.digest) == (4, None, None)


def test_an_inspection_of_nothing_is_still_one(tmp_path: Path, base: Path) -> None:
    seen = inspect(tmp_path / "nowhere", base, pickle_files=("adapter_model.bin",))
    assert (seen.accepted, seen.error, seen.checks[0].passed) == (False, "MissingConfigError", False)
    assert json.loads(json.dumps(asdict(seen)))["checks"][1] == {"name": "configuration", "passed": None, "detail": ""}


def test_real_adapters_are_far_within_the_limits(shared: Path) -> None:
    layout = module_layout(resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").folder)
    norms = []
    for file in sorted(shared.glob("adapters/*/adapter_config.json")):
        seen = inspect_adapter(file.parent, source=file.parent.name, layout=layout)
        assert seen.accepted, seen.message
        norms += [seen.delta_norm_min or 0.0, seen.delta_norm_max or 0.0]
    assert min(norms) > 0.1
    assert max(norms) < Limits().max_delta_norm / 100
