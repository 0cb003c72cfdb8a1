"""Bases in 8 and 4 bits: each row as if the base were a plain one with the weights that the stored ones stand for."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.engine.base_model import BaseModel, DType, ModelSettings, Quantization, load_base_model
from lora_hub_sdk.engine.base_weights import is_quantized, is_transposed, stored_weight
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.linear import linear_products
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import MissingExtraError, UnsupportedFeatureError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.families import FAMILIES, tiny_family
from lora_hub_sdk.types import Adapter, Route, Sampling
from tests.engine.peft_layers import PeftReference
from tests.engine.test_exactness import Passes
from tests.engine.test_families import PROMPTS, TOKEN, VARIANTS
from tests.support import adapter_at, relative_error, route_of

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

KINDS: Final = get_args(Quantization)
#: Plain and Conv1D linears, biases, a tied head, experts that stay as they are.
NAMES: Final = ("llama", "gpt2", "phi", "mixtral")
#: One product against float32 numbers: rounding alone.
PRODUCT: Final[dict[DType, float]] = {"float32": 1e-5, "bfloat16": 2**-6, "float16": 2**-9}
#: Logits against the plain float32 model with the same weights.
LOGITS: Final[dict[DType, float]] = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.03}
#: PEFT over bitsandbytes' own forward: that of 8 bits rounds inputs to 8 bits too.
PEFT: Final[dict[str, float]] = {"8bit": 0.1, "4bit": 1e-4}
#: Two kernels, by the number of rows, round differently.
ALONE: Final[dict[DType, float]] = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.01}
QUICK: Final = NAMES[:3]
ORIGINAL: Final = ("pissa", "olora")


class Bench:
    """A family's model in so many bits, and the plain model that it stands for."""

    def __init__(self, name: str, kind: Quantization, dtype: DType, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.family, self.folder = FAMILIES[name], folder / name
        if not self.folder.is_dir():
            tiny_family(self.folder, name)
        self.base = load_base_model(resolve_model(self.folder), ModelSettings(dtype=dtype, quantization=kind))
        self.passes = Passes(self.base)
        plain = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")
        for path in quantized(self.base):
            module = plain.get_submodule(path)
            weight = stored_weight(self.base.modules[path]).float()
            module.weight.data = weight.t().contiguous() if is_transposed(module) else weight
        self.reference = PeftReference(plain.requires_grad_(False))
        self.adapter = functools.cache(self._adapter)

    def _adapter(self, variant: str) -> Adapter:
        folder = self.folder.parent / f"{self.folder.name}-{variant}"
        if not folder.is_dir():
            tiny_adapter(folder, self.folder, seed=len(variant), **VARIANTS[variant](self.family))
        return adapter_at(folder, self.folder)

    def routes(self, variant: str) -> list[Route]:
        own, plain, other = (self.adapter(name) for name in (variant, "plain", "dora"))
        return [
            route_of("selection", (own, 1.0)),
            route_of("mixture", (own, 0.5), (plain, 0.3), (other, 0.4)),
            route_of("base"),
            route_of("mixture", (plain, 0.5), (own, -0.7)),
            route_of("selection", (plain, 1.0)),
            route_of("mixture", (own, 0.4)),
        ]


def quantized(base: BaseModel) -> list[str]:
    return [path for path in base.shapes if is_quantized(base.modules[path])]


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Quantization, DType], Bench]:
    folder = tmp_path_factory.mktemp("quantized")
    return functools.cache(lambda name, kind, dtype: Bench(name, kind, dtype, folder))


Of = Callable[[str, Quantization, DType], Bench]


@pytest.mark.parametrize("dtype", PRODUCT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_product_is_that_of_the_weights_that_the_stored_ones_stand_for(
    bench_of: Of, name: str, kind: Quantization, dtype: DType
) -> None:
    base = bench_of(name, kind, dtype).base
    paths = quantized(base)
    assert paths
    for path in paths:
        module: Any = base.modules[path]
        for shape in ((1, 1), (3, 7), (2, 40)):
            x = torch.randn(*shape, base.shapes[path][1]).to(base.dtype)
            bias = 0.0 if module.bias is None else module.bias.float()
            expected = x.float() @ stored_weight(module).float().t() + bias
            found = base.products[path](x)
            assert found.dtype == base.dtype
            assert relative_error(found.float(), expected) < PRODUCT[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in ORIGINAL])
@pytest.mark.parametrize("name", QUICK)
def test_each_row_of_a_mixed_batch_is_what_peft_gives_it_on_the_plain_model(
    bench_of: Of, name: str, variant: str, kind: Quantization
) -> None:
    check_rows(bench_of(name, kind, "float32"), variant, LOGITS["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUICK)
def test_half_precision_stays_within_its_tolerance(bench_of: Of, name: str, kind: Quantization, dtype: DType) -> None:
    for variant in ("plain", "dora", "lora_bias"):
        check_rows(bench_of(name, kind, dtype), variant, LOGITS[dtype])


def check_rows(bench: Bench, variant: str, tolerance: float) -> None:
    routes = bench.routes(variant)
    read, stepped = bench.passes.logits(PROMPTS, routes), bench.passes.step(PROMPTS, routes, TOKEN)
    for row, (prompt, route) in enumerate(zip(PROMPTS, routes, strict=True)):
        ids = bench.passes.ids(prompt)
        assert relative_error(read[row], bench.reference.logits(route, ids)) < tolerance
        assert relative_error(stepped[row], bench.reference.logits(route, [*ids, TOKEN])) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUICK)
def test_selection_is_near_what_peft_makes_of_the_same_quantized_model(
    bench_of: Of, name: str, kind: Quantization
) -> None:
    from peft import PeftModel

    bench = bench_of(name, kind, "float32")
    # PEFT loses the scales of 8-bit weights when it needs their norms for DoRA.
    for variant in ("plain", "rslora", "dora") if kind == "4bit" else ("plain", "rslora"):
        adapter = bench.adapter(variant)
        model = load_base_model(
            resolve_model(bench.folder), ModelSettings(dtype="float32", quantization=kind)
        ).model  # PEFT changes the one that it is given
        theirs: Any = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
        found = bench.passes.logits(PROMPTS, [route_of("selection", (adapter, 1.0))] * len(PROMPTS))
        for row, prompt in enumerate(PROMPTS):
            with torch.inference_mode():
                expected = theirs(torch.tensor([bench.passes.ids(prompt)])).logits[0, -1]
            assert relative_error(found[row], expected) < PEFT[kind]


@pytest.mark.parametrize("dtype", ALONE)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_batch_is_what_it_is_alone(bench_of: Of, kind: Quantization, dtype: DType) -> None:
    """LLM.int8 by itself chooses the columns that it does not round by all rows of a batch together."""
    bench = bench_of("llama", kind, dtype)
    routes = bench.routes("dora")
    read, stepped = bench.passes.logits(PROMPTS, routes), bench.passes.step(PROMPTS, routes, TOKEN)
    for row, (prompt, route) in enumerate(zip(PROMPTS, routes, strict=True)):
        assert relative_error(read[row], bench.passes.logits([prompt], [route])[0]) < ALONE[dtype]
        assert relative_error(stepped[row], bench.passes.step([prompt], [route], TOKEN)[0]) < ALONE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_with_one_huge_input_leaves_the_others_alone(bench_of: Of, kind: Quantization) -> None:
    base = bench_of("llama", kind, "float32").base
    path = quantized(base)[0]
    x = torch.randn(5, 1, base.shapes[path][1])
    with torch.inference_mode():
        alone = base.products[path](x[:4])
        x[4, 0, 3] = 100.0  # above the threshold of LLM.int8
        assert relative_error(base.products[path](x)[:4], alone) < 1e-5


@pytest.mark.parametrize("init", ORIGINAL)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_needs_the_original_weights_is_refused_by_name(
    bench_of: Of, kind: Quantization, init: str
) -> None:
    bench = bench_of("llama", kind, "float32")
    engine = Engine(bench.base)
    try:
        with pytest.raises(UnsupportedFeatureError, match=f"{init} on a quantized base"):
            engine.generate([Request("a", route_of("selection", (bench.adapter(init), 1.0)), Sampling(2))])
    finally:
        engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_come_without_a_word_of_the_library(
    bench_of: Of, kind: Quantization, caplog: pytest.LogCaptureFixture
) -> None:
    """bitsandbytes logs each of its own 8-bit products of anything but float16."""
    bench = bench_of("llama", kind, "float32")
    with caplog.at_level(logging.WARNING):
        engine = Engine(bench.base)
        texts = [
            done.text for done in engine.generate([Request(text, route_of("base"), Sampling(6)) for text in PROMPTS])
        ]
        engine.close()
    assert len(set(texts)) > 1
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_sizes_are_those_of_what_is_stored(bench_of: Of) -> None:
    plain = load_base_model(resolve_model(bench_of("llama", "8bit", "float32").folder), ModelSettings(dtype="float32"))
    model: Any = plain.model
    assert plain.size_bytes == 4 * sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    inner = sum(plain.shapes[path][0] * plain.shapes[path][1] for path in plain.shapes if path != "lm_head")
    rows = sum(plain.shapes[path][0] for path in plain.shapes if path != "lm_head")
    eight, four = (bench_of("llama", kind, "float32").base for kind in KINDS)
    assert eight.size_bytes == plain.size_bytes - 4 * inner + inner + 4 * rows
    # Half a byte each, one for the scale of 64, and small tables of each module.
    small = four.size_bytes - (plain.size_bytes - 4 * inner + inner // 2 + inner // 64)
    assert 0 < small < 1200 * len(quantized(four))
    head = plain.shapes["lm_head"]
    assert eight.packed_bytes == 4 * head[0] * head[1]  # the head is not quantized


def test_weights_shared_by_embedding_and_head_count_once(bench_of: Of) -> None:
    base = load_base_model(resolve_model(bench_of("gpt2", "8bit", "float32").folder), ModelSettings(dtype="float32"))
    model: Any = base.model
    stored = {id(one): one.numel() for one in (*model.parameters(), *model.buffers())}
    assert base.size_bytes == 4 * sum(stored.values())


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lora_hub_sdk.engine.base_model.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    folder = tiny_family(tmp_path / "llama", "llama")
    with pytest.raises(MissingExtraError, match=r"lora-hub-sdk\[quantization\]"):
        load_base_model(resolve_model(folder), ModelSettings(quantization="4bit"))


def wide(kind: str) -> tuple[torch.nn.Module, Tensor]:
    """A layer large enough for the library's own kernel, in bfloat16, and the weights that it stands for."""
    import bitsandbytes

    torch.manual_seed(0)
    weight = torch.randn(96, 128) / 11
    library: Any = bitsandbytes.nn
    if kind == "4bit":
        module = library.Linear4bit(128, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
        module.weight = library.Params4bit(weight.bfloat16(), requires_grad=False, quant_type="nf4")
    else:
        module = library.Linear8bitLt(128, 96, has_fp16_weights=False)
        module.weight = library.Int8Params(weight.half(), requires_grad=False)
    module = module.eval().requires_grad_(False)
    module.bias.data = module.bias.data.bfloat16()
    module = module.to("cpu")
    return module, stored_weight(module).float()


@pytest.mark.parametrize("packed_bytes", [0, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wide_layer_in_bfloat16_is_right_with_and_without_a_packed_copy(kind: str, packed_bytes: int) -> None:
    module, weight = wide(kind)
    own: Any = module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    product = linear_products({"m": module}, packed_bytes=packed_bytes)["m"]
    for rows in (1, 3, 200):
        x = torch.randn(rows, 1, 128).bfloat16()
        with torch.inference_mode():
            found = product(x)
            assert relative_error(found.float(), x.float() @ weight.t() + own.bias.float()) < PRODUCT["bfloat16"]
            alone = torch.cat([product(row[None]) for row in x])
            assert relative_error(found.float(), alone.float()) < PRODUCT["bfloat16"]
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_rows_are_near_the_plain_model(kind: Quantization, tmp_path: Path) -> None:
    bench = Bench("llama", kind, "float16", tmp_path)
    check_rows(bench, "dora", LOGITS["float16"])
