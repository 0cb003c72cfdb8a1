"""Every variant of an adapter on every family of models, in one batch: each row as PEFT has it, one prompt at a time.

One table: a variant that is claimed is a line of ``VARIANTS``, a family one of ``testing.families.FAMILIES``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lora_hub_sdk.engine.base_model import DType, ModelSettings, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import UnmatchedTensorsError, UnsupportedFeatureError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.families import FAMILIES, Family, tiny_family
from lora_hub_sdk.types import Adapter, Route, Sampling
from tests.engine.peft_layers import PeftReference
from tests.engine.test_exactness import Passes
from tests.support import DenseReference, adapter_at, relative_error, route_of

PROMPTS: Final = ["a", "some longer prompt", "the third one, which is longer than the others", "b c d e", "f", "g h"]
TOKEN: Final = 77
#: Of the largest logit of the float32 reference. bfloat16 keeps 8 bits and float16 11, and these models are steep: so
#: their errors are also held against those of PEFT in that dtype, which computes the adapters themselves in float32.
TOLERANCES: Final[dict[DType, float]] = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.03}
WORSE_THAN_PEFT: Final = 3.0

QUICK_FAMILIES: Final = ("llama", "gemma3", "gpt2")
QUICK_VARIANTS: Final = ("plain", "dora", "lora_bias", "embedding", "saved_head", "pissa")

#: What ``tiny_adapter`` is asked for, by the family.
VARIANTS: Final[dict[str, Callable[[Family], dict[str, Any]]]] = {
    "plain": lambda of: {"rank": 4, "modules": of.linears},
    "rslora": lambda of: {"rank": 9, "alpha": 6.0, "modules": of.linears, "rslora": True},
    "patterns": lambda of: {
        "rank": 3,
        "modules": of.linears,
        "rank_pattern": {of.linears[0]: 7, of.linears[-1]: 1},
        "alpha_pattern": {of.linears[-1]: 3.0},
    },
    "layers": lambda of: {"rank": 5, "modules": of.attention, "layers": (1,)},
    "dora": lambda of: {"rank": 4, "modules": of.linears, "dora": True},
    "rsdora": lambda of: {"rank": 8, "modules": of.attention, "dora": True, "rslora": True},
    "lora_bias": lambda of: {"rank": 4, "modules": of.linears, "lora_bias": True},
    "bias_all": lambda of: {"rank": 4, "modules": of.attention, "bias": "all"},
    "bias_lora_only": lambda of: {"rank": 4, "modules": of.attention, "bias": "lora_only"},
    "embedding": lambda of: {"rank": 4, "modules": (*of.attention, of.embedding)},
    "dora_embedding": lambda of: {"rank": 4, "modules": (*of.attention, of.embedding), "dora": True},
    "head": lambda of: {"rank": 4, "modules": (*of.attention, "lm_head")},
    "saved_head": lambda of: {"rank": 4, "modules": of.attention, "modules_to_save": ("lm_head",)},
    "saved_embedding": lambda of: {"rank": 4, "modules": of.attention, "modules_to_save": (of.embedding,)},
    "saved_norms": lambda of: {"rank": 4, "modules": of.attention, "modules_to_save": of.norms},
    "saved_linear": lambda of: {"rank": 4, "modules": of.attention[:1], "modules_to_save": of.attention[1:2]},
    "pissa": lambda of: {"rank": 4, "modules": of.linears, "init": "pissa"},
    # PEFT cannot read its own OLoRA of a weight that is stored as (in, out), unless it is square.
    "olora": lambda of: {
        "rank": 4,
        "modules": ("transformer.h.0.attn.c_proj",) if of.transposed else of.linears,
        "init": "olora",
    },
    "bfloat16": lambda of: {"rank": 4, "modules": of.linears, "dtype": "bfloat16"},
}


class Bench:
    """A family's model in one dtype, its adapters, and the reference beside it."""

    def __init__(self, name: str, dtype: DType, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.family = FAMILIES[name]
        self.folder = folder / name
        if not self.folder.is_dir():
            tiny_family(self.folder, name)
        self.passes = Passes(load_base_model(resolve_model(self.folder), ModelSettings(dtype=dtype)))
        self.exact, self.own = (
            PeftReference(AutoModelForCausalLM.from_pretrained(self.folder, dtype=of)) for of in ("float32", dtype)
        )
        self.dense = DenseReference(self.folder, AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32"))
        self.adapter = functools.cache(self._adapter)

    def _adapter(self, variant: str) -> Adapter:
        folder = self.folder.parent / f"{self.folder.name}-{variant}"
        if not folder.is_dir():
            tiny_adapter(folder, self.folder, seed=len(variant), **VARIANTS[variant](self.family))
        return adapter_at(folder, self.folder)

    def routes(self, variant: str) -> list[Route]:
        """It alone, with others of its kind and of other kinds, and rows that do not have it."""
        own, plain, other = (self.adapter(name) for name in (variant, "plain", "rslora"))
        # Vectors of PiSSA with either sign are equally right, and their means are not.
        averaged = "mixture" if variant == "pissa" else "fusion"
        return [
            route_of("selection", (own, 1.0)),
            route_of("mixture", (own, 0.5), (plain, 0.3), (other, 0.4)),
            route_of("base"),
            route_of("mixture", (plain, 0.5), (own, -0.7)),
            route_of("selection", (plain, 1.0)),
            route_of(averaged, (own, 0.5), (other, 0.6)),
        ]

    def expected(self, route: Route, ids: list[int]) -> Tensor:
        """Logits (vocabulary,) in float32: by PEFT, or by dense weights where parameters are averaged."""
        return (self.dense if route.averaged == "parameters" else self.exact).logits(route, ids)


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, DType], Bench]:
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name, dtype: Bench(name, dtype, folder))


def table() -> list[Any]:
    """Every variant on every family in float32; of the others some, and the rest among the slow tests.

    Not experts in half precision: a router that rounds may choose others, so no tolerance holds, PEFT's neither.
    """
    cases = []
    for name, family in FAMILIES.items():
        for variant in VARIANTS:
            for dtype in TOLERANCES if family.mlp else ("float32",):
                quick = dtype == "float32" or (name in QUICK_FAMILIES and variant in QUICK_VARIANTS)
                cases.append(pytest.param(name, variant, dtype, marks=() if quick else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("name", "variant", "dtype"), table())
def test_each_row_of_a_mixed_batch_is_what_peft_gives_it_alone(
    bench_of: Callable[[str, DType], Bench], name: str, variant: str, dtype: DType
) -> None:
    bench = bench_of(name, dtype)
    routes = bench.routes(variant)
    read = bench.passes.logits(PROMPTS, routes)
    stepped = bench.passes.step(PROMPTS, routes, TOKEN)
    asked = list(zip(map(bench.passes.ids, PROMPTS), routes, strict=True))
    want = torch.stack([bench.expected(route, ids) for ids, route in asked])
    want_stepped = torch.stack([bench.expected(route, [*ids, TOKEN]) for ids, route in asked])
    for found, expected in zip((*read, *stepped), (*want, *want_stepped), strict=True):
        assert relative_error(found, expected) < TOLERANCES[dtype]
    if dtype != "float32":
        places = [place for place, (_, route) in enumerate(asked) if route.averaged == "outputs"]
        theirs = torch.stack([bench.own.logits(asked[place][1], asked[place][0]) for place in places])
        assert _rms(read[places] - want[places]) < WORSE_THAN_PEFT * _rms(theirs - want[places])


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.mlp])
@pytest.mark.parametrize("target", ["gate", "gate_proj", "w1"])
def test_an_adapter_of_experts_is_refused_by_name(name: str, target: str, tmp_path: Path) -> None:
    """They are no linear modules: one tensor holds all of them, and each token goes to some."""
    folder = tiny_family(tmp_path / name, name)
    adapter = tiny_adapter(tmp_path / "lora", folder, modules=("q_proj",))
    tensors = load_file(adapter / "adapter_model.safetensors")
    for side, shape in (("A", (4, 32)), ("B", (48, 4))):
        tensors[f"base_model.model.model.layers.0.mlp.experts.0.{target}.lora_{side}.weight"] = torch.ones(shape)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    raw = json.loads((adapter / "adapter_config.json").read_text())
    raw["target_modules"].append(target)
    (adapter / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(UnmatchedTensorsError, match=rf"experts\.0\.{target}"):
        adapter_at(adapter, folder)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.mlp])
def test_peft_names_of_expert_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / name, name)
    adapter = tiny_adapter(tmp_path / "lora", folder, modules=("q_proj",))
    raw = json.loads((adapter / "adapter_config.json").read_text())
    raw["target_parameters"] = ["mlp.experts.gate_up_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedFeatureError, match="target_parameters"):
        adapter_at(adapter, folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_what_its_table_says(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = load_base_model(resolve_model(tiny_family(tmp_path / name, name)))
    short = {path: path.rpartition(".")[2] for path in base.shapes}
    model: Any = base.model
    assert set(short.values()) == {*family.linears, "lm_head"}
    assert {short[path] for path in short if getattr(base.modules[path], "bias", None) is not None} == set(
        family.biased
    )
    assert base.embedding is not None
    assert base.embedding.endswith(family.embedding)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == family.tied
    assert any(isinstance(module, Conv1D) for module in base.modules.values()) == family.transposed


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_transformers_generate_and_vary(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_family(tmp_path / name, name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    engine = Engine(load_base_model(resolve_model(folder)))
    found = engine.generate([Request(prompt, route_of("base"), Sampling(10)) for prompt in PROMPTS])
    engine.close()
    tokenizer: Any = engine.base.tokenizer
    for prompt, done in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert done.text == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert len({done.text for done in found}) > len(found) // 2
    assert engine.stats().splits == 0
