from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lora_hub_sdk.errors import InvalidConfigError, MissingConfigError, UnsupportedFeatureError
from lora_hub_sdk.registry.adapter_config import parse_adapter_config, read_adapter_config, read_regular, strict_json
from tests.registry.damage import SHAPES

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


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "proj", "elf_attn.k_proj"]},
        {"target_modules": []},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj", "proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "model.layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["ayers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    ],
)
def test_what_plain_names_select_is_what_peft_selects(changes: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    theirs, ours = LoraConfig(r=8, **changes), parse(**changes).selection
    strange = [
        "h.0.q_proj",
        "0.q_proj",
        "x.layers.q_proj",
        "a.b.1.c.0.q_proj",
        "q_proj",
        "a.layers.1",
        "xq_proj",
        "a.1.q_proj",
    ]
    for module in (*SHAPES, *strange):
        found = check_target_module_exists(theirs, module)
        assert ours.covers(module) == (bool(found) and not isinstance(found, _ExcludedModule)), module


def test_of_two_spellings_of_one_name_the_first_wins_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {r"layers\.0\.q_proj": 2, "layers.0.q_proj": 3, "q_proj$": 4, "q_proj": 5}
    config = parse(rank_pattern=patterns)
    for module in ("model.layers.0.q_proj", "model.layers.1.q_proj"):
        assert config.rank(module) == patterns[get_pattern_key(list(patterns), module)]


@pytest.mark.parametrize("name", ["somebody/base", "base", "/home/josé/mödel", "~/é", "./é", "C:\\é", "a b", "", None])
def test_names_of_base_models_that_are_what_they_look_like_are_taken_as_they_are(name: str | None) -> None:
    assert parse(base_model_name_or_path=name).base_model == (name or "")


def test_what_peft_writes_by_default_is_accepted(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(str(tmp_path))
    assert read_adapter_config(tmp_path, "mine").r == 4


#: Fields of PEFT that say how an adapter was trained, or what decides its numbers and is understood.
UNDERSTOOD: dict[str, Any] = {
    "auto_mapping": {"parent_library": "peft"},
    "base_model_name_or_path": "somebody/base",
    "bias": "lora_only",
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0},
    "exclude_modules": ["lm_head"],
    "fan_in_fan_out": True,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "layers_pattern": None,
    "layers_to_transform": [0, 1],
    "lora_alpha": 32,
    "lora_bias": True,
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "modules_to_save": ["lm_head"],
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 32,
    "r": 4,
    "alpha_pattern": {"q_proj": 4},
    "rank_pattern": {"q_proj": 4},
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": True,
    "use_rslora": True,
}
#: Fields of PEFT that change answers in ways that are not served, switched on.
REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 3},
    "corda_config": {"corda_method": "ipm"},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 4], [2, 5]],
    "loftq_config": {"bits": 4},
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_config": {"hidden_size": 32},
    "monteclora_config": {"samples": 2},
    "target_parameters": ["w"],
    "trainable_token_indices": [1, 2],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"rank": 2},
}
_INITS = ("pissa_niter_4", "corda", "loftq", "lora_ga", "a_new_one")


def test_every_field_of_pefts_lora_is_understood_or_refused() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} == UNDERSTOOD.keys() | REFUSED.keys()
    assert UNDERSTOOD.keys().isdisjoint(REFUSED)


@pytest.mark.parametrize("field", UNDERSTOOD)
def test_a_field_that_does_not_change_answers_is_accepted(field: str) -> None:
    assert parse(**{field: UNDERSTOOD[field]})
    assert field in ("peft_type", "r", "lora_alpha") or parse(**{field: None})


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_plain(init: object) -> None:
    assert parse(init_lora_weights=init).init == "plain"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_take_a_known_part_of_the_base_are_told_apart(init: str) -> None:
    assert parse(init_lora_weights=init).init == init


@pytest.mark.parametrize("field", ["use_dora", "init_lora_weights"])
def test_a_bias_of_lora_b_beside_what_peft_refuses_beside_it_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"lora_bias with {field}"):
        parse(lora_bias=True, use_dora=field == "use_dora", init_lora_weights="gaussian")


@pytest.mark.parametrize("names", [["lm_head"], ["norm"], ["mlp", "o_proj"], ["layers.0.mlp"], ["model.norm"], None])
def test_the_modules_that_are_saved_are_those_that_peft_saves(names: list[str] | None, base: Path) -> None:
    from peft import get_peft_model
    from peft.utils.other import ModulesToSaveWrapper
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config, ours = LoraConfig(target_modules=["q_proj"], modules_to_save=names), parse(modules_to_save=names)
    paths = [path for path, module in model.named_modules() if path and not [*module.children()]]
    tuned: Any = get_peft_model(model, config)
    wrapped = tuned.base_model.model.named_modules()
    saved = {path.split(".original_module")[0] + "." for path, one in wrapped if isinstance(one, ModulesToSaveWrapper)}
    assert {path for path in paths if ours.saves(path)} == {
        path for path in paths if f"{path}.".startswith(tuple(saved))
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *REFUSED.items(),
        *(("init_lora_weights", init) for init in _INITS),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("bias", "others"),
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


def test_a_file_that_turns_into_a_pipe_or_a_folder_never_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="no regular file"):
            read_regular(tmp_path / name, 10)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_regular(tmp_path / "file", 3) == b"012"


@pytest.mark.parametrize(
    "text",
    ["{}", '{"a": [1, 2.5, -3e7, true, null, "\u00e9"], "b": {"a": {}}}', '"x"', "[[[[[]]]]]", "123456789012345678"],
)
def test_ordinary_json_is_read_as_ever(text: str) -> None:
    assert strict_json(text.encode()) == json.loads(text)
