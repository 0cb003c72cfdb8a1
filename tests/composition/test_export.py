"""An exported route is the route: loaded by PEFT, registered again, and cut to a rank with its true error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lora_hub_sdk.composition.export import Base, Content, Exported, export_route
from lora_hub_sdk.engine.adapter_file import open_factors
from lora_hub_sdk.engine.base_model import ModelSettings, load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.errors import AdapterChangedError, ConfigurationError, UnsupportedRouteError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry.layout import BaseLayout
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Adapter, Route, Sampling
from tests.engine.test_exactness import EVERYTHING, POOL, Passes
from tests.support import adapter_at, dense_deltas, relative_error, route_of

TOLERANCE = 1e-4
TOKENS = 6
#: Beside the pool of the engine's tests: ranks up to 64, which is more than the tiny model's matrices have.
LARGE: tuple[dict[str, Any], ...] = (
    {"rank": 32, "alpha": 16.0, "modules": EVERYTHING, "rslora": True},
    {"rank": 64, "alpha": 32.0, "modules": ("q_proj", "down_proj")},
)
PROMPTS = ("a", "two words", "a third prompt that is longer")


@dataclass
class Bench:
    """A tiny base with its engine, a pool of adapters, and PEFT beside it."""

    base: Path
    layout: BaseLayout
    adapters: list[Adapter]
    engine: Engine
    passes: Passes

    def export(self, route: Route, path: Path, **options: Any) -> Exported:
        return export_route(route, path, layout=lambda _: self.layout, read=read, base=never, **options)

    def served(self, folder: Path) -> Any:
        """PEFT's own model, which must take every tensor of the file and have no other."""
        from peft import PeftModel, get_peft_model_state_dict

        model = PeftModel.from_pretrained(self.plain(), folder)
        stored, taken = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
        assert stored.keys() == taken.keys()
        assert all(torch.equal(stored[key].float(), taken[key]) for key in stored)
        return model

    def plain(self) -> Any:
        """The base model in transformers."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def random_route(self, draw: random.Random) -> Route:
        members = draw.sample(self.adapters, draw.randint(1, 4))
        return route_of(
            draw.choice(["mixture", "fusion"]), *((adapter, draw.uniform(0.05, 0.5)) for adapter in members)
        )


def read(adapter: Adapter) -> Content:
    content = open_factors(adapter)
    content.verify()
    return content


def never(base_model: str) -> Base:
    raise AssertionError(f"nobody needs {base_model}")


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    pool = tmp_path_factory.mktemp("pool")
    folders = [
        tiny_adapter(pool / f"lora-{place}", base, seed=place, **spec) for place, spec in enumerate((*POOL, *LARGE))
    ]
    engine = Engine(load_base_model(resolve_model(base), ModelSettings(dtype="float32")))
    adapters = [adapter_at(path, base, id=place) for place, path in enumerate(folders)]
    return Bench(base, module_layout(base), adapters, engine, Passes(engine.base))


def test_fifty_random_routes_are_the_same_when_peft_serves_them(bench: Bench, tmp_path: Path) -> None:
    draw = random.Random(50)
    routes = [bench.random_route(draw) for _ in range(50)]
    prompts = [draw.choice(PROMPTS) for _ in routes]
    sampling = Sampling(max_new_tokens=TOKENS)
    answers = bench.engine.generate(
        [Request(prompt, route, sampling) for prompt, route in zip(prompts, routes, strict=True)]
    )
    for place, (prompt, route, answer) in enumerate(zip(prompts, routes, answers, strict=True)):
        folder = tmp_path / str(place)
        exported = bench.export(route, folder)
        assert exported.relative_error < 2e-7
        ids = torch.tensor([bench.passes.ids(prompt)])
        with torch.inference_mode():
            model = bench.served(folder)
            logits = model(ids).logits[0, -1]
            tokens = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )[0, ids.shape[1] :]
        expected = bench.passes.logits([prompt, "neighbour"], [route, route_of("base")])[0]
        assert relative_error(logits, expected) < TOLERANCE, route
        assert bench.engine.base.tokenizer.decode(tokens, skip_special_tokens=True) == answer.text


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
def test_an_export_passes_admission_and_this_engine_answers_with_it_as_with_the_route(
    bench: Bench, tmp_path: Path, strategy: str
) -> None:
    route = route_of(strategy, *((bench.adapters[place], 0.25) for place in (2, 5, 7, 8)))
    exported = bench.export(route, tmp_path / "one")
    again = adapter_at(tmp_path / "one", bench.base)
    assert (again.digest, again.rank, again.size_bytes) == (exported.digest, exported.rank, exported.size_bytes)
    prompts = list(PROMPTS)
    found = bench.passes.logits(prompts, [route_of("selection", (again, 1.0))] * 3)
    assert relative_error(found, bench.passes.logits(prompts, [route] * 3)) < TOLERANCE


def test_one_rank_for_all_and_every_layer_of_a_kind_of_module(bench: Bench, tmp_path: Path) -> None:
    """vLLM and LoRAX read neither patterns nor layers_to_transform."""
    only_layer_1, wide_mlp = bench.adapters[8], bench.adapters[1]
    exported = bench.export(route_of("mixture", (only_layer_1, 0.5), (wide_mlp, 0.5)), tmp_path / "one")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], exported.rank) == (14, 14, 14)
    assert config["target_modules"] == sorted(EVERYTHING)
    assert not config.keys() & {"rank_pattern", "alpha_pattern", "layers_to_transform"}
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(EVERYTHING)
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {14}
    assert not tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].any()
    assert len(exported.errors) == 2 * 3 + 4


def test_modules_are_named_by_their_paths_where_a_short_name_means_others_too(bench: Bench, tmp_path: Path) -> None:
    linears = {**bench.layout.linears, "model.layers.0.extra.q_proj": (32, 32)}
    layout = replace(bench.layout, linears=linears, others=frozenset({"model.v_proj"}))
    route = route_of("selection", (bench.adapters[4], 1.0))
    export_route(route, tmp_path / "one", layout=lambda _: layout, read=read, base=never)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    ]
    bench.served(tmp_path / "one")


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_a_rank_is_kept_and_the_error_is_the_dense_one(bench: Bench, tmp_path: Path, strategy: str, rank: int) -> None:
    route = route_of(strategy, *((bench.adapters[place], 0.3) for place in (3, 6, 7)))
    exported = bench.export(route, tmp_path / "one", rank=rank)
    deltas = {key: delta.double() for key, delta in dense_deltas(route, bench.plain()).items()}
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    lost, whole = 0.0, 0.0
    for name, delta in deltas.items():
        path = name.removesuffix(".weight")
        key = f"base_model.model.{path}.lora_"
        missing = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double() - delta
        lost, whole = lost + float(missing.square().sum()), whole + float(delta.square().sum())
        assert exported.errors[path] == pytest.approx(float(missing.norm() / delta.norm()), rel=1e-3, abs=1e-6)
    assert exported.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-6)
    assert exported.largest_error == max(exported.errors.values())
    assert exported.rank == min(rank, exported.exact_rank)
    assert exported.relative_error > 0.01 or rank >= exported.exact_rank


def test_a_rank_that_is_enough_is_exact(bench: Bench, tmp_path: Path) -> None:
    route = route_of("mixture", *((bench.adapters[place], 0.3) for place in (0, 3, 4)))
    exact = bench.export(route, tmp_path / "exact")
    assert exact.rank == exact.exact_rank == 15
    assert bench.export(route, tmp_path / "enough", rank=15) == replace(exact, path=tmp_path / "enough")
    many = route_of("mixture", (bench.adapters[10], 0.5), (bench.adapters[11], 0.5))
    whole = bench.export(many, tmp_path / "many")
    cut = bench.export(many, tmp_path / "cut", rank=32)
    assert (whole.rank, whole.exact_rank, cut.rank) == (96, 32, 32)
    assert cut.relative_error < 2e-7


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_rounding_to_a_dtype_counts_in_the_error(bench: Bench, tmp_path: Path, dtype: str, step: float) -> None:
    route = route_of("mixture", (bench.adapters[0], 0.5), (bench.adapters[3], 0.25))
    exported = bench.export(route, tmp_path / "one", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    assert step / 8 < exported.relative_error < step
    bench.served(tmp_path / "one")


def test_members_of_the_same_content_are_one_and_those_without_weight_none(bench: Bench, tmp_path: Path) -> None:
    one, other = bench.adapters[4], bench.adapters[0]
    twin = replace(one, name="twin", id=99)
    exported = bench.export(route_of("mixture", (one, 0.25), (other, 0.0), (twin, 0.75)), tmp_path / "one")
    assert exported == replace(bench.export(route_of("selection", (one, 1.0)), tmp_path / "two"), path=tmp_path / "one")
    assert exported.rank == one.rank


# -- what is written -----------------------------------------------------------------------------------------------


def test_the_card_tells_where_everything_comes_from(bench: Bench, tmp_path: Path) -> None:
    members = [
        replace(bench.adapters[0], name="a|b\n# c", repo_id="user/lora-a", license="mit", base_model="user/base"),
        replace(bench.adapters[3], repo_id=str(tmp_path), license="mit", base_model="user/base"),
    ]
    bench.export(route_of("mixture", (members[0], 0.5), (members[1], 0.25)), tmp_path / "one", rank=4)
    text = (tmp_path / "one" / "README.md").read_text()
    data: Any = ModelCard(text).data
    assert data.base_model == "user/base"
    assert data.license == "mit"
    assert data.tags == ["base_model:adapter:user/base", "lora", "lora-hub-sdk"]
    rows = [line for line in text.splitlines() if line.startswith("| 0.")]
    assert [row.split(" | ")[0] for row in rows] == ["| 0.5", "| 0.25"]
    for member in members:
        assert member.digest in text
        assert member.revision in text
    assert "user/lora-a" in text
    assert str(tmp_path) not in text
    assert "\n# c" not in text


def test_a_base_on_this_machine_is_not_told_to_the_world(bench: Bench, tmp_path: Path) -> None:
    bench.export(route_of("selection", (bench.adapters[4], 1.0)), tmp_path / "one")
    assert str(bench.base) not in (tmp_path / "one" / "README.md").read_text()
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        bench.base
    )


def test_a_folder_appears_as_a_whole_or_not_at_all(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = route_of("selection", (bench.adapters[4], 1.0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert bench.export(route, tmp_path / "link").path == tmp_path / "empty"
    with pytest.raises(ConfigurationError, match="holds something already"):
        bench.export(route, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds something already"):
        bench.export(route, tmp_path / "file")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        bench.export(route, tmp_path / "file" / "below")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("lora_hub_sdk.composition.export.export_card", _fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        bench.export(route, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def _fails(*_: object) -> str:
    raise RuntimeError("in the middle")


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (lambda route: replace(route, averaged="tokens"), UnsupportedRouteError, "from token to token"),
        (lambda route: replace(route, members=()), UnsupportedRouteError, "base model alone"),
        (lambda route: _with(route, weight=0.0), UnsupportedRouteError, "base model alone"),
        (lambda route: _with(route, weight=float("nan")), ConfigurationError, "finite"),
        (lambda route: _with(route, weight=1e200), ConfigurationError, "beyond torch.float32"),
        (lambda route: _changed(route, base_model="other"), ConfigurationError, "several base models: .*other"),
        (lambda route: _changed(route, digest="0" * 64), AdapterChangedError, "was registered with digest 0000"),
    ],
)
def test_a_route_that_is_no_adapter_is_refused_by_name(
    bench: Bench, tmp_path: Path, change: Callable[[Route], Route], error: type[Exception], why: str
) -> None:
    route = route_of("mixture", (bench.adapters[0], 0.5), (bench.adapters[4], 0.5))
    with pytest.raises(error, match=why):
        bench.export(change(route), tmp_path / "one")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": 2.0}, {"rank": True}, {"dtype": "int8"}, {"dtype": "float64"}]
)
def test_an_option_that_cannot_be_is_refused(bench: Bench, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}="):
        bench.export(route_of("selection", (bench.adapters[0], 1.0)), tmp_path / "one", **options)


def _with(route: Route, *, weight: float) -> Route:
    return replace(route, members=tuple(replace(member, weight=weight) for member in route.members))


def _changed(route: Route, **changes: Any) -> Route:
    first, *others = route.members
    return replace(route, members=(replace(first, adapter=replace(first.adapter, **changes)), *others))
