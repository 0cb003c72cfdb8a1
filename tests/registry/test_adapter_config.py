from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lora_hub_sdk.errors import InvalidConfigError, MissingConfigError, UnsupportedFeatureError
from lora_hub_sdk.registry.adapter_config import parse_adapter_config, read_adapter_config

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 8,
    "lora_alpha": 16,
}


def parse(**changes: Any) -> Any:
    return parse_adapter_config({**PLAIN, **changes}, "mine")


def test_scale_is_alpha_over_rank_and_for_rslora_over_its_root() -> None:
    assert parse().scale("any.q_proj") == 2.0
    assert parse(use_rslora=True, r=16, lora_alpha=8).scale("any.q_proj") == 2.0


def test_patterns_hold_for_the_end_of_a_path_and_the_first_match_wins() -> None:
    config = parse(
        rank_pattern={"layers.1.q_proj": 2, "q_proj": 4}, alpha_pattern={"^model.layers.0.q_proj": 1, "k_proj": 80}
    )
    assert [config.rank(path) for path in ("model.layers.1.q_proj", "model.layers.0.q_proj", "v_proj")] == [2, 4, 8]
    assert config.rank("model.layers.11.q_proj") == 4  # "layers.1" is no end of "layers.11"
    assert config.scale("model.layers.0.q_proj") == 1 / 4
    assert config.scale("model.layers.0.k_proj") == 10.0
    assert config.rank("xq_proj") == 8


@pytest.mark.parametrize("module", ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.k_proj"])
def test_ranks_and_scales_equal_pefts(module: str) -> None:
    from peft.utils.other import get_pattern_key

    raw = {
        "rank_pattern": {r"layers\.1\.q_proj": 2, "k_proj": 3},
        "alpha_pattern": {"q_proj": 5, "^model.layers.1.k_proj": 7},
    }
    config = parse(**raw, use_rslora=True)
    rank = raw["rank_pattern"].get(get_pattern_key(list(raw["rank_pattern"]), module), 8)
    alpha = raw["alpha_pattern"].get(get_pattern_key(list(raw["alpha_pattern"]), module), 16)
    assert config.rank(module) == rank
    assert config.scale(module) == pytest.approx(alpha / rank**0.5)


def test_what_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    assert read_adapter_config(tmp_path, "mine").r == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["w"]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("loftq_config", {"bits": 4}),
        ("rank_pattern", {"(q|k)_proj": 4}),
        ("rank_pattern", {"(a+)+$": 4}),
        ("a_field_of_the_future", "on"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        parse(**{field: value})
    assert field in str(caught.value)
    assert "mine" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": "8"},
        {"r": True},
        {"r": None},
        {"lora_alpha": "high"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": -1}},
        {"alpha_pattern": {"q_proj": None}},
        {"base_model_name_or_path": 7},
    ],
)
def test_values_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError):
        parse(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"r": 1' + " " * 1_000_000 + "}"])
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidConfigError):
        read_adapter_config(tmp_path, "mine")


def test_no_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MissingConfigError, match="no adapter_config"):
        read_adapter_config(tmp_path, "mine")


def test_real_adapters_are_accepted(shared: Path) -> None:
    for file in sorted(shared.glob("adapters/*/adapter_config.json")):
        assert read_adapter_config(file.parent, file.parent.name).r == json.loads(file.read_text())["r"]
