"""Variants of adapters at the border: served where every part is there and means something, else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.errors import (
    AdmissionError,
    NoEffectError,
    NonFiniteWeightsError,
    OutOfBoundsError,
    ShapeMismatchError,
    UnmatchedTensorsError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry.admission import Admitted, admit
from lora_hub_sdk.registry.inspection import inspect_adapter
from lora_hub_sdk.registry.layout import BaseLayout
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.families import tiny_family

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
ATTN = "transformer.h.0.attn.c_attn"
EMBEDDING, WTE = "model.embed_tokens", "transformer.wte"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_family(folder / name, name) for name in ("llama", "gpt2", "gemma2", "opt", "mixtral")}


def check(folder: Path, base: Path) -> Admitted:
    """The verdict, which the inspection must share."""
    layout = module_layout(base)
    seen = inspect_adapter(folder, source="mine", layout=layout)
    verdict: Admitted | AdmissionError
    try:
        verdict = admit(folder, source="mine", layout=layout)
    except AdmissionError as error:
        verdict = error
    refused = isinstance(verdict, AdmissionError)
    assert (seen.accepted, seen.message) == (not refused, str(verdict) if refused else None)
    if isinstance(verdict, AdmissionError):
        raise verdict
    return verdict


def change(folder: Path, spoil: Callable[[Tensors], object], **config: Any) -> None:
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    spoil(tensors)
    save_file({PREFIX + key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


WEIGHTS = "adapter_model.safetensors"


# -- served -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "modules", "rank", "told"),
    [
        ({"dora": True}, ("q_proj", "v_proj"), 4, "DoRA"),
        ({"lora_bias": True, "rslora": True}, ("q_proj", "v_proj"), 4, "rsLoRA, lora_bias"),
        ({"bias": "all"}, ("q_proj", "v_proj"), 4, "bias=all"),
        ({"modules": ("embed_tokens", "lm_head")}, ("embed_tokens", "lm_head"), 4, "plain LoRA"),
        ({"modules_to_save": ("norm",)}, ("norm", "q_proj", "v_proj"), 4, "modules_to_save"),
        ({"init": "pissa"}, ("q_proj", "v_proj"), 8, "PiSSA"),
        ({"init": "olora"}, ("q_proj", "v_proj"), 8, "OLoRA"),
        ({"init": "eva"}, ("q_proj", "v_proj"), 4, "plain LoRA"),
    ],
)
def test_a_served_variant_is_described_as_it_is_served(
    options: dict[str, Any], modules: tuple[str, ...], rank: int, told: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    if options.get("modules_to_save") == ("norm",):
        options = {"modules_to_save": ("model.norm",)}
    folder = tiny_adapter(tmp_path / "lora", bases["llama"], **options)
    admitted = check(folder, bases["llama"])
    assert (admitted.target_modules, admitted.max_rank) == (modules, rank)
    seen = inspect_adapter(folder, source="mine", layout=module_layout(bases["llama"]))
    assert {one.name: one.detail for one in seen.checks}["features"] == told


def zero_factors(tensors: Tensors) -> None:
    for key, tensor in tensors.items():
        if key.endswith("lora_B.weight"):
            tensor.zero_()


@pytest.mark.parametrize("options", [{"dora": True}, {"modules_to_save": ("lm_head",)}, {"lora_bias": True}])
def test_what_an_adapter_has_beside_its_factors_is_an_effect(
    options: dict[str, Any], bases: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", bases["llama"], **options)
    change(folder, zero_factors)
    assert check(folder, bases["llama"])


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"modules": ("embed_tokens", "q_proj")}])
def test_zeros_and_copies_of_the_base_are_no_effect(
    options: dict[str, Any], bases: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", bases["llama"], **options)

    def clear(tensors: Tensors) -> None:
        zero_factors(tensors)
        for key, tensor in tensors.items():
            if "base_layer" not in key:
                tensor.zero_()

    change(folder, clear)
    with pytest.raises(NoEffectError):
        check(folder, bases["llama"])


def test_an_adapter_of_saved_modules_alone_is_served(bases: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "lora", bases["llama"], modules=(), modules_to_save=("lm_head",))
    change(folder, lambda tensors: None, target_modules="dummy-target-modules")
    admitted = check(folder, bases["llama"])
    assert (admitted.modules, admitted.saved, admitted.max_rank) == ((), ("lm_head",), 0)


def test_embedding_weights_that_peft_stored_without_a_word_are_known(bases: Mapping[str, Path], tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "lora", bases["llama"])
    change(folder, lambda tensors: tensors.update({f"{EMBEDDING}.weight": torch.ones(258, 32)}))
    assert check(folder, bases["llama"]).saved == ()


# -- refused by name --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """An adapter that nobody can serve as it was meant, and the feature that the refusal names."""

    feature: str
    base: str = "llama"
    made: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    spoil: Callable[[Tensors], object] = lambda tensors: None


def _add(**tensors: tuple[int, ...]) -> Callable[[Tensors], object]:
    """Tensors of ones under names whose dots are written as two underscores."""
    return lambda held: held.update({name.replace("__", "."): torch.ones(shape) for name, shape in tensors.items()})


def _resized(*keys: str) -> Callable[[Tensors], object]:
    def grow(tensors: Tensors) -> None:
        for key in keys:
            axis = tensors[key].shape.index(258)
            tensors[key] = torch.cat([tensors[key], tensors[key].narrow(axis, 0, 2)], dim=axis)

    return grow


GPT2 = {"modules": ("c_attn",)}
SAVED = "a saved module that is neither linear, norm nor input embedding"
TIE = "ensure_weight_tying of parts that are not the same"
ADDED = "a vocabulary of another size than the base model's (added tokens)"
REFUSALS = {
    **{
        f"init {init}": Refusal("init_lora_weights", config={"init_lora_weights": init})
        for init in ("pissa_niter_4", "corda", "loftq", "lora_ga")
    },
    "another method": Refusal("peft_type", config={"peft_type": "IA3"}),
    "repeated layers": Refusal("layer_replication", config={"layer_replication": [[0, 2], [1, 2]]}),
    "trained tokens": Refusal("trainable_token_indices", config={"trainable_token_indices": [1, 2]}),
    "experts": Refusal("target_parameters", config={"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "aLoRA": Refusal("alora_invocation_tokens", config={"alora_invocation_tokens": [1]}),
    "QALoRA": Refusal("use_qalora", config={"use_qalora": True}),
    "BD-LoRA": Refusal("use_bdlora", config={"use_bdlora": {"nblocks": 2}}),
    "arrow": Refusal("arrow_config", config={"arrow_config": {"top_k": 1}}),
    "megatron": Refusal("megatron_config", config={"megatron_config": {"x": 1}}),
    "an unknown bias": Refusal("bias", config={"bias": "some"}),
    "lora_bias and DoRA": Refusal("lora_bias with use_dora", made={"dora": True}, config={"lora_bias": True}),
    "DoRA without magnitudes": Refusal("use_dora without a magnitude of every module", config={"use_dora": True}),
    "DoRA without one magnitude": Refusal(
        "use_dora without a magnitude of every module",
        made={"dora": True},
        spoil=lambda tensors: tensors.pop(f"{Q}.lora_magnitude_vector"),
    ),
    "magnitudes without DoRA": Refusal("a magnitude without use_dora", made={"dora": True}, config={"use_dora": False}),
    "lora_bias without biases": Refusal("lora_bias without a bias of every module", config={"lora_bias": True}),
    "biases without lora_bias": Refusal(
        "a bias of lora_B without lora_bias", made={"lora_bias": True}, config={"lora_bias": False}
    ),
    "lora_bias of an embedding": Refusal(
        "lora_bias of an embedding", made={"modules": ("embed_tokens",)}, config={"lora_bias": True}
    ),
    "saved and adapted": Refusal("a module both saved and adapted", config={"modules_to_save": ["q_proj"]}),
    "saved beside factors": Refusal(
        "a module both saved and adapted",
        base="gpt2",
        made=GPT2,
        config={"bias": "all"},
        spoil=_add(**{f"{ATTN}.bias".replace(".", "__"): (96,)}),
    ),
    "saved position embedding": Refusal(SAVED, base="gpt2", made=GPT2, config={"modules_to_save": ["wpe"]}),
    "saved position embedding, stored": Refusal(SAVED, base="gpt2", made={**GPT2, "modules_to_save": ("wpe",)}),
    "saved layer with experts": Refusal(SAVED, base="mixtral", config={"modules_to_save": ["layers.0"]}),
    "LoRA on positions": Refusal(
        "LoRA on an embedding that is not the input's",
        base="gpt2",
        made=GPT2,
        config={"target_modules": ["c_attn", "wpe"]},
        spoil=_add(transformer__wpe__lora_embedding_A=(4, 256), transformer__wpe__lora_embedding_B=(32, 4)),
    ),
    "LoRA on positions of OPT": Refusal(
        "LoRA on an embedding that is not the input's",
        base="opt",
        spoil=_add(model__decoder__embed_positions__lora_embedding_A=(4, 258)),
    ),
    "LoRA on experts": Refusal(
        "LoRA on a module that is neither linear nor the input embedding",
        base="mixtral",
        spoil=_add(model__layers__0__mlp__experts__lora_A__weight=(16, 32)),
    ),
    "added tokens, embedding": Refusal(
        ADDED, made={"modules_to_save": ("embed_tokens",)}, spoil=_resized(f"{EMBEDDING}.weight")
    ),
    "added tokens, head": Refusal(ADDED, made={"modules_to_save": ("lm_head",)}, spoil=_resized("lm_head.weight")),
    "added tokens, stored without a word": Refusal(
        ADDED, spoil=_add(model__embed_tokens__weight=(260, 32), lm_head__weight=(260, 32))
    ),
    "added tokens, adapted": Refusal(
        ADDED,
        made={"modules": ("embed_tokens",)},
        spoil=_resized(f"{EMBEDDING}.lora_embedding_A", f"{EMBEDDING}.base_layer.weight"),
    ),
    "added tokens, adapted head": Refusal(
        ADDED, made={"modules": ("lm_head",)}, spoil=_resized("lm_head.lora_B.weight")
    ),
    "PiSSA of scale 0": Refusal(
        "pissa with a scale of 0 or less", config={"init_lora_weights": "pissa", "lora_alpha": 0}
    ),
    "PiSSA of a tied head": Refusal(
        "pissa of a head that is tied to the embedding, without the weight that it left",
        base="gemma2",
        made={"modules": ("lm_head",), "init": "pissa"},
        spoil=lambda tensors: tensors.pop("lm_head.base_layer.weight"),
    ),
    "tied in one place": Refusal(
        TIE, base="gemma2", made={"modules": ("embed_tokens",)}, config={"ensure_weight_tying": True}
    ),
    "tied and not the same": Refusal(
        TIE, base="gemma2", made={"modules": ("embed_tokens", "lm_head")}, config={"ensure_weight_tying": True}
    ),
    "tied and saved in one place": Refusal(
        TIE, base="gemma2", made={"modules_to_save": ("embed_tokens",)}, config={"ensure_weight_tying": True}
    ),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_served_exactly_is_refused_by_its_name(
    case: Refusal, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", bases[case.base], **case.made)
    change(folder, case.spoil, **case.config)
    with pytest.raises(UnsupportedFeatureError) as caught:
        check(folder, bases[case.base])
    assert caught.value.feature == case.feature
    assert case.feature in str(caught.value)


# -- damaged ----------------------------------------------------------------------------------------------------

#: Every kind of tensor that a file may hold.
RICH: dict[str, Any] = {
    "modules": ("q_proj", "embed_tokens"),
    "modules_to_save": ("lm_head", "model.norm"),
    "dora": True,
}
BIASED: dict[str, Any] = {"modules": ("c_attn",), "bias": "all", "lora_bias": True}
KINDS = {
    "llama": (
        f"{Q}.lora_A.weight",
        f"{Q}.lora_B.weight",
        f"{Q}.lora_magnitude_vector",
        f"{EMBEDDING}.lora_embedding_A",
        f"{EMBEDDING}.lora_embedding_B",
        f"{EMBEDDING}.lora_magnitude_vector",
        f"{EMBEDDING}.base_layer.weight",
        "lm_head.weight",
        "model.norm.weight",
    ),
    "gpt2": (f"{ATTN}.lora_B.bias", f"{ATTN}.base_layer.bias", "transformer.h.0.ln_1.bias"),
}
ALL_KINDS = [(base, key) for base, keys in KINDS.items() for key in keys]


@pytest.fixture
def rich(bases: Mapping[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda base: tiny_adapter(tmp_path / "lora", bases[base], **(RICH if base == "llama" else BIASED))


def test_the_undamaged_ones_are_served(rich: Callable[[str], Path], bases: Mapping[str, Path]) -> None:
    for base in KINDS:
        assert check(rich(base), bases[base])


@pytest.mark.parametrize(("base", "key"), ALL_KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_values_of_every_tensor_are_finite_and_bounded(
    base: str, key: str, value: float, rich: Callable[[str], Path], bases: Mapping[str, Path]
) -> None:
    folder = rich(base)
    change(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    kind = OutOfBoundsError if value == 1e5 else NonFiniteWeightsError
    with pytest.raises(kind, match=key.replace(".", r"\.")):
        check(folder, bases[base])


@pytest.mark.parametrize(("base", "key"), ALL_KINDS)
def test_every_tensor_has_the_shape_that_the_base_asks_for(
    base: str, key: str, rich: Callable[[str], Path], bases: Mapping[str, Path]
) -> None:
    folder = rich(base)
    change(folder, lambda tensors: tensors.update({key: tensors[key].reshape(-1)[:-1]}))
    with pytest.raises(ShapeMismatchError, match=key.replace(".", r"\.")):
        check(folder, bases[base])


@pytest.mark.parametrize(("base", "key"), ALL_KINDS)
def test_no_tensor_may_be_missing(base: str, key: str, rich: Callable[[str], Path], bases: Mapping[str, Path]) -> None:
    folder = rich(base)
    change(folder, lambda tensors: tensors.pop(key))
    if "base_layer" in key or key.endswith("ln_1.bias"):  # the base has them
        assert check(folder, bases[base])
        return
    with pytest.raises((UnmatchedTensorsError, UnsupportedFeatureError)):
        check(folder, bases[base])


@pytest.mark.parametrize(
    "key",
    [
        f"{Q}.base_layer.weight",
        f"{Q}.base_layer.bias",
        f"{Q}.bias",
        f"{Q}.weight",
        "model.layers.0.self_attn.k_proj.base_layer.weight",
        "lm_head.base_layer.weight",
        "model.layers.0.input_layernorm.weight",
        f"{EMBEDDING}.lora_A.weight",
        f"{EMBEDDING}.bias",
        "lm_head.lora_embedding_A",
        "model.norm.lora_A.weight",
        "model.norm.weight.default",
        "score.weight",
        "model",
    ],
)
def test_no_tensor_may_be_too_many(key: str, rich: Callable[[str], Path], bases: Mapping[str, Path]) -> None:
    folder = rich("llama")
    change(folder, lambda tensors: tensors.update({key: torch.ones(32, 32)}))
    with pytest.raises((UnmatchedTensorsError, UnsupportedFeatureError)):
        check(folder, bases["llama"])


def test_a_file_larger_than_its_saved_modules_could_make_it_is_not_read(
    bases: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", bases["llama"], modules_to_save=("mlp",))
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(20 << 20)
    with pytest.raises(OutOfBoundsError, match="header_bytes"):
        check(folder, bases["llama"])


# -- layouts ----------------------------------------------------------------------------------------------------


def test_the_layout_of_a_base_names_all_its_parts(bases: Mapping[str, Path]) -> None:
    llama, gpt2, mixtral = (module_layout(bases[name]) for name in ("llama", "gpt2", "mixtral"))
    assert (llama.embedding, llama.head, llama.tied) == ((EMBEDDING, (258, 32)), "lm_head", False)
    assert (gpt2.embedding, gpt2.head, gpt2.tied) == ((WTE, (258, 32)), "lm_head", True)
    assert gpt2.parameters[ATTN] == {"weight": (32, 96), "bias": (96,)}
    assert gpt2.linears[ATTN] == (96, 32)
    assert gpt2.parameters["transformer.ln_f"] == {"weight": (32,), "bias": (32,)}
    assert gpt2.others == {"transformer.wpe"}
    assert mixtral.others == {f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("gate", "experts")}
    assert (llama.factors(EMBEDDING), llama.factors(Q), llama.factors("model.norm")) == ((32, 258), (32, 32), None)
    assert BaseLayout().factors("") is None
