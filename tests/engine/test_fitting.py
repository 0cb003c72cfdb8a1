"""Every variant of an adapter, fitted to its base, does what PEFT does with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.fitting import Fitting
from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.errors import NonFiniteWeightsError, UnsupportedFeatureError
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.families import FAMILIES, tiny_family
from tests.support import DenseReference, Patched, adapter_at, relative_error, route_of

IDS = [5, 9, 33, 7, 8, 20, 100, 3, 4, 77]
#: Separate linears without biases; fused and transposed ones with biases, tied; biases everywhere; a scaled tied table.
BASES = ("llama", "gpt2", "phi", "gemma3")
#: Options of ``tiny_adapter``; "table" stands for the family's embedding, "norms" for its norms, "first" and "other"
#: for linear modules.
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": {"first": 5}, "alpha_pattern": {"other": 1.0}},
    "layers": {"layers": [1], "dora": True},
    "gaussian": {"init": "gaussian"},
    "mica": {"init": "mica"},
    "dora": {"dora": True},
    "dora rslora": {"dora": True, "rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "bias all dora": {"bias": "all", "dora": True},
    "bias lora_only": {"bias": "lora_only"},
    "embedding": {"modules": ("first", "table")},
    "embedding dora": {"modules": ("first", "table"), "dora": True},
    "head": {"modules": ("first", "lm_head")},
    "head dora": {"modules": ("first", "lm_head"), "dora": True},
    "both ends": {"modules": ("table", "lm_head")},
    "saved ends": {"modules_to_save": ("table", "lm_head")},
    "saved head": {"modules_to_save": ("lm_head",)},
    "saved norms": {"modules_to_save": ("norms",)},
    "saved linear": {"modules": ("first",), "modules_to_save": ("other",)},
    "saved mlp": {"modules": ("first",), "modules_to_save": ("mlp",), "dora": True},
    "pissa": {"init": "pissa"},
    "pissa dora": {"init": "pissa", "dora": True},
    "pissa embedding": {"init": "pissa", "modules": ("first", "table")},
    "pissa head": {"init": "pissa", "modules": ("first", "lm_head")},
    "olora": {"init": "olora"},
    "olora rslora": {"init": "olora", "rslora": True},
    "olora head": {"init": "olora", "modules": ("first", "lm_head")},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_family(folder / name, name) for name in BASES}


@functools.cache
def model_of(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def named(family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the family's own names of modules."""
    about = FAMILIES[family]
    names = {
        "first": about.attention[:1], "other": about.mlp[-1:], "table": (about.embedding,), "norms": about.norms
    }  # fmt: skip
    if family == "gpt2":  # its c_proj stands in attention and MLP
        names["other"] = ("mlp.c_proj",) if "modules_to_save" in options else ("c_fc",)

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rest for key, rest in value.items() for name in names.get(key, (key,))}
        return tuple(name for one in value for name in names.get(one, (one,)))

    given = {key: own(value) if isinstance(value, dict | tuple) else value for key, value in options.items()}
    return {"modules": own(("first", "other")), "rank": 3, **given}


def deltas_of(factors: AdapterFactors, model: Any) -> dict[str, Tensor]:
    """What fitted factors change in each parameter."""
    found: dict[str, Tensor] = {}
    for path, one in factors.modules.items():
        weight = model.get_submodule(path).weight.data
        change = one.scale * one.b.float() @ one.a.float()
        turned = type(model.get_submodule(path)).__name__ != "Linear"
        if one.gain is not None:
            change = change + (one.gain - 1)[:, None] * (weight.T if turned else weight)
        found[f"{path}.weight"] = change.T if turned else change
        if one.shift is not None:
            found[f"{path}.bias"] = one.shift
    for path, parameters in factors.saved.items():
        for name, value in parameters.items():
            found[f"{path}.{name}"] = value.float() - getattr(model.get_submodule(path), name).data
    return found


def fitted(folder: Path, base: Path) -> AdapterFactors:
    model = model_of(base)
    layout = module_layout(base)
    fitting = Fitting(dict(model.named_modules()), embedding=layout.embedding[0] if layout.embedding else None)
    return fitting.fit(load_factors(adapter_at(folder, base)))


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.tensor([IDS])).logits[0, -1].clone()
        return found


def by_peft(folder: Path, base: Path) -> Tensor:
    """On a fresh copy of the base: PEFT writes to it."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_does_on_each_base_what_peft_does_with_it(
    family: str, variant: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    if family == "gpt2" and variant.startswith("olora"):
        pytest.skip("PEFT itself makes no OLoRA of transposed weights unless they are square")
    base, model = bases[family], model_of(bases[family])
    folder = tiny_adapter(tmp_path / "lora", base, seed=3, **named(family, VARIANTS[variant]))
    expected = by_peft(folder, base)
    made = fitted(folder, base)
    assert made.init == "plain"
    assert all(one.magnitude is None for one in made.modules.values())
    with Patched(model, deltas_of(made, model)):
        found = logits(model)
    assert relative_error(found, expected) < 1e-4
    reference = DenseReference(base, model).logits(route_of("mixture", (adapter_at(folder, base), 1.0)), IDS)
    assert relative_error(reference, expected) < 1e-4
    if FAMILIES[family].biased or not variant.startswith("bias"):
        assert relative_error(logits(model), expected) > 1e-3, "the adapter changes nothing"


def saved_by_peft(folder: Path, base: Path, **options: Any) -> Path:
    """A real PEFT model with every trained parameter moved, as it saves itself."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned: Any = get_peft_model(model, LoraConfig(r=3, task_type="CAUSAL_LM", **options))
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
    tuned.save_pretrained(folder)
    return folder


REAL: dict[str, dict[str, Any]] = {
    "tied factors": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tied by the head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tied and saved": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True
    },
    "not tied": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "all linears": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "pissa head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora", "use_dora": True},
    "saved layer": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "norm"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", REAL.values(), ids=REAL.keys())
def test_what_peft_itself_saves_does_what_peft_does_with_it(
    options: dict[str, Any], bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base, model = bases["gemma3"], model_of(bases["gemma3"])
    folder = saved_by_peft(tmp_path / "lora", base, **options)
    expected = by_peft(folder, base)
    with Patched(model, deltas_of(fitted(folder, base), model)):
        assert relative_error(logits(model), expected) < 1e-4
    assert relative_error(logits(model), expected) > 1e-3


# -- parts of it ------------------------------------------------------------------------------------------------


def fitting_of(base: Path, model: Any = None, **options: Any) -> Fitting:
    layout = module_layout(base)
    assert layout.embedding is not None
    return Fitting(dict((model or model_of(base)).named_modules()), embedding=layout.embedding[0], **options)


def test_a_plain_adapter_is_given_back_as_it_is(bases: Mapping[str, Path], tmp_path: Path) -> None:
    factors = load_factors(adapter_at(tiny_adapter(tmp_path / "lora", bases["llama"]), bases["llama"]))
    assert fitting_of(bases["llama"]).fit(factors) is factors


def rewrite(folder: Path, key: str, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / "adapter_model.safetensors")


COPY = "base_model.model.{}.base_layer.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_bases_own_weight_is_dropped_with_its_memory(
    dtype: torch.dtype, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    folder = tiny_adapter(tmp_path / "lora", base, modules=("embed_tokens", "lm_head"), rank=1)
    rewrite(folder, COPY.format("lm_head"), lambda tensor: tensor.to(dtype))
    factors = load_factors(adapter_at(folder, base))
    made = fitted(folder, base)
    assert set(factors.saved) == {"model.embed_tokens", "lm_head"}
    assert not made.saved
    assert made.size_bytes < factors.size_bytes / 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_factors_beside_another_weight_than_the_bases_belong_to_that_one(
    family: str, module: str, options: dict[str, Any], bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base, model = bases[family], model_of(bases[family])
    folder = tiny_adapter(tmp_path / "lora", base, modules=("q_proj", module), **options)
    path = "lm_head" if module == "lm_head" else "model.embed_tokens"
    rewrite(folder, COPY.format(path), lambda tensor: 1.25 * tensor)
    made = fitted(folder, base)
    assert path in made.saved
    assert path not in made.modules
    assert len(made.saved) == (2 if family == "gemma3" else 1), "a tied weight is one"
    with Patched(model, deltas_of(made, model)):
        assert relative_error(logits(model), by_peft(folder, base)) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_embedding_that_was_stored_without_a_word_is_served(
    family: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base, model = bases[family], model_of(bases[family])
    folder = tiny_adapter(tmp_path / "lora", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = 1.25 * model.get_input_embeddings().weight.data
    save_file(tensors, folder / "adapter_model.safetensors")
    with Patched(model, deltas_of(fitted(folder, base), model)):
        assert relative_error(logits(model), by_peft(folder, base)) < 1e-4


def test_a_saved_module_that_was_not_trained_is_dropped(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base, model = bases["llama"], model_of(bases["llama"])
    folder = tiny_adapter(tmp_path / "lora", base, modules_to_save=("model.norm", "lm_head"))
    rewrite(folder, "base_model.model.lm_head.weight", lambda _: model.lm_head.weight.data.clone())
    assert set(fitted(folder, base).saved) == {"model.norm"}


def test_a_magnitude_of_weights_that_are_zero_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    folder = tiny_adapter(tmp_path / "lora", base, dora=True)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    factors = load_factors(adapter_at(folder, base))
    path = next(iter(factors.modules))
    model.get_submodule(path).weight.data[3] = 0
    factors.modules[path].b[3] = 0
    with pytest.raises(NonFiniteWeightsError, match="magnitudes"):
        fitting_of(base, model).fit(factors)


def count_svds(computed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd

    def counted(weight: Tensor, **how: Any) -> Any:
        computed.append(weight)
        return svd(weight, **how)

    monkeypatch.setattr(torch.linalg, "svd", counted)


def test_threads_that_need_the_same_principal_parts_compute_them_once(
    bases: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases["llama"]
    computed: list[Any] = []
    folder = tiny_adapter(tmp_path / "lora", base, init="pissa")
    count_svds(computed, monkeypatch)
    adapter, fitting = adapter_at(folder, base), fitting_of(base)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: fitting.fit(load_factors(adapter)), range(8)))
    assert len(computed) == len(made[0].modules)
    for path, one in made[0].modules.items():
        assert all(torch.equal(one.b, other.modules[path].b) for other in made)


def test_principal_parts_are_forgotten_where_there_is_no_room(
    bases: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases["llama"]
    computed: list[Any] = []
    folder = tiny_adapter(tmp_path / "lora", base, init="pissa")
    count_svds(computed, monkeypatch)
    factors, fitting = load_factors(adapter_at(folder, base)), fitting_of(base, cache_bytes=1)
    first, second = fitting.fit(factors), fitting.fit(factors)
    assert len(computed) == 2 * len(factors.modules)
    assert all(torch.equal(one.b, second.modules[path].b) for path, one in first.modules.items())


def test_fitting_leaves_base_and_factors_as_they_are(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base, model = bases["llama"], model_of(bases["llama"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    variants: tuple[dict[str, Any], ...] = ({"dora": True}, {"init": "pissa"}, {"init": "olora", "dora": True})
    for number, options in enumerate(variants):
        factors = load_factors(adapter_at(tiny_adapter(tmp_path / str(number), base, **options), base))
        held = [tensor.clone() for tensor in factors.tensors()]
        fitting_of(base).fit(factors)
        assert all(torch.equal(one, other) for one, other in zip(held, factors.tensors(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gains_beside_a_narrow_base_are_computed_in_float32(
    dtype: torch.dtype, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    factors = load_factors(adapter_at(tiny_adapter(tmp_path / "lora", base, dora=True), base))
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for path, one in fitting_of(base, model).fit(factors).modules.items():
        raw, weight = factors.modules[path], model.get_submodule(path).weight.float()
        expected = raw.magnitude / (weight + raw.scale * raw.b @ raw.a).norm(dim=1)
        assert one.gain is not None
        assert one.gain.dtype == torch.float32
        torch.testing.assert_close(one.gain, expected)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_base_takes_dora_beside_its_dequantized_weights(
    bits: str, family: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    from peft.utils.integrations import dequantize_module_weight

    base, model = bases[family], quantized(bases[family], bits)
    folder = tiny_adapter(tmp_path / "lora", base, seed=3, **named(family, {"dora": True}))
    factors = load_factors(adapter_at(folder, base))
    for path, one in fitting_of(base, model).fit(factors).modules.items():
        raw, weight = factors.modules[path], dequantize_module_weight(model.get_submodule(path)).float()
        expected = raw.magnitude / (weight + raw.scale * raw.b @ raw.a).norm(dim=1)
        assert one.gain is not None
        torch.testing.assert_close(one.gain, expected)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_needs_the_bases_original_weights_is_refused_on_a_quantized_base(
    init: str, bits: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    factors = load_factors(adapter_at(tiny_adapter(tmp_path / init, base, init=init), base))
    with pytest.raises(UnsupportedFeatureError, match=f"{init} on a quantized base model"):
        fitting_of(base, quantized(base, bits)).fit(factors)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_saved_module_is_given_as_its_quantized_one_would_hold_it(
    bits: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    base = bases["gpt2"]
    folder = tiny_adapter(tmp_path / "lora", base, modules=("c_attn",), modules_to_save=("mlp",), bias="all")
    factors = load_factors(adapter_at(folder, base))
    made = fitting_of(base, quantized(base, bits)).fit(factors)
    for path in (path for path in factors.saved if path.endswith("c_fc")):
        assert torch.equal(made.saved[path]["weight"], factors.saved[path]["weight"].T)


def quantized(base: Path, bits: str) -> Any:
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    how = {"load_in_8bit": True} if bits == "8bit" else {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings(**how), device_map="cpu")


def test_the_size_counts_every_tensor_of_an_adapter_once() -> None:
    one = torch.ones(2, 8)
    extra = LoraFactors(one, one.T, 1.0, gain=torch.ones(8), shift=torch.ones(8), magnitude=torch.ones(8))
    factors = AdapterFactors("d", {"m": extra}, {"n": {"weight": torch.ones(4)}})
    assert factors.size_bytes == 64 + 3 * 32 + 16
