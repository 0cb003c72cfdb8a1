"""Adapters of every variant in an export: exact as PEFT serves it, copied, cut with the true error, or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_hub_sdk.composition.export import Exported, export_route
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.for_export import BaseForExport
from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.errors import ConfigurationError, UnsupportedRouteError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.families import FAMILIES, tiny_family
from lora_hub_sdk.types import Adapter, Route
from tests.composition.test_export import read
from tests.support import DenseReference, adapter_at, dense_deltas, relative_error, route_of

TOLERANCE = 1e-4
IDS = (5, 9, 200, 17, 33, 80, 6)


@dataclass
class Family:
    """A tiny base of one family, and adapters for it."""

    name: str
    base: Path
    folder: Path
    loaded: BaseModel

    def adapter(self, **spec: Any) -> Adapter:
        place = sum(1 for _ in self.folder.iterdir())
        spec = {"modules": FAMILIES[self.name].linears, "seed": place, **spec}
        return adapter_at(tiny_adapter(self.folder / str(place), self.base, **spec), self.base, id=place)

    def export(self, route: Route, path: Path, **options: Any) -> Exported:
        layout = module_layout(self.base)
        return export_route(
            route, path, layout=lambda _: layout, read=read, base=lambda _: BaseForExport(self.loaded), **options
        )

    def plain(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)

    def check(self, route: Route, path: Path) -> None:
        """PEFT's logits of the export are those of the dense weights, and this package takes it as its own."""
        from peft import PeftModel

        expected = DenseReference(self.base, self.plain()).logits(route, IDS)
        assert relative_error(expected, self.plain()(torch.tensor([IDS])).logits[0, -1]) > 0.01
        with torch.inference_mode():
            model: Any = PeftModel.from_pretrained(self.plain(), path)
            assert relative_error(model(torch.tensor([IDS])).logits[0, -1], expected) < TOLERANCE
        again = adapter_at(path, self.base, id=99)
        found = DenseReference(self.base, self.plain()).logits(route_of("selection", (again, 1.0)), IDS)
        assert relative_error(found, expected) < TOLERANCE


def family_at(folder: Path, name: str) -> Family:
    base = tiny_family(folder / "base", name)
    (folder / "pool").mkdir()
    return Family(name, base, folder / "pool", load_base_model(resolve_model(base), ModelSettings(dtype="float32")))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return family_at(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_all_that_has_factors_is_saved_exactly(tmp_path: Path, name: str) -> None:
    family, own = family_at(tmp_path, name), FAMILIES[name]
    everything = family.adapter(modules=[*own.linears, own.embedding, "lm_head"], rank=3)
    route = route_of("mixture", (everything, 0.4), (family.adapter(layers=[1]), 0.5))
    family.export(route, tmp_path / "one")
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted({*own.linears, own.embedding, "lm_head"})
    family.check(route, tmp_path / "one")


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
@pytest.mark.parametrize(
    "spec",
    [
        {"lora_bias": True},
        {"init": "pissa"},
        {"init": "olora"},
        {"init": "pissa", "rslora": True, "rank": 3},
        {"bias": "lora_only"},
        {"modules": ["embedding"]},
        {"modules": ["lm_head"]},
        {"modules": ["embedding", "lm_head"], "rank": 7},
    ],
    ids=str,
)
def test_a_variant_beside_a_plain_adapter_is_exact(
    family: Family, tmp_path: Path, spec: dict[str, Any], strategy: str
) -> None:
    route = route_of(strategy, (family.adapter(**_named(spec, family)), 0.4), (family.adapter(rank=3), 0.5))
    if strategy == "fusion" and "init" in spec:
        with pytest.raises(UnsupportedRouteError, match="cannot be averaged with others' apart"):
            family.export(route, tmp_path / "one")
        return
    exported = family.export(route, tmp_path / "one")
    assert exported.relative_error < 2e-7
    family.check(route, tmp_path / "one")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_alone_it_is_the_conversion_to_plain_lora(family: Family, tmp_path: Path, init: str) -> None:
    adapter = family.adapter(init=init, rank=3)
    route = route_of("selection", (adapter, 1.0))
    assert family.export(route, tmp_path / "one").rank == adapter.rank == 6
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    family.check(route, tmp_path / "one")


@pytest.mark.parametrize(
    "spec", [{"dora": True}, {"modules_to_save": ["norm"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_what_is_no_lora_is_copied_alone_and_refused_beside_others(
    family: Family, tmp_path: Path, spec: dict[str, Any]
) -> None:
    adapter = family.adapter(**_named(spec, family))
    exported = family.export(route_of("selection", (adapter, 1.0)), tmp_path / "one")
    assert exported.digest == adapter.digest
    assert exported.relative_error == exported.largest_error == 0.0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (adapter.folder / name).read_bytes()
    for route in (
        route_of("mixture", (adapter, 0.5)),
        route_of("mixture", (adapter, 0.5), (family.adapter(), 0.5)),
        route_of("fusion", (adapter, 0.5), (family.adapter(), 0.5)),
    ):
        with pytest.raises(UnsupportedRouteError, match="DoRA" if "dora" in spec else "modules_to_save"):
            family.export(route, tmp_path / "two")
    with pytest.raises(ConfigurationError, match="copied as it is"):
        family.export(route_of("selection", (adapter, 1.0)), tmp_path / "two", dtype="bfloat16")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
def test_dora_can_be_cut_to_a_rank_and_the_error_is_the_dense_one(
    family: Family, tmp_path: Path, strategy: str
) -> None:
    route = route_of(strategy, (family.adapter(dora=True), 0.5), (family.adapter(dora=True, rank=2), 0.4))
    exported = family.export(route, tmp_path / "one", rank=8)
    assert exported.rank == 8 < exported.exact_rank
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    lost, whole = 0.0, 0.0
    for name, delta in dense_deltas(route, family.plain()).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        saved = tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        missing = (saved.T if FAMILIES[family.name].transposed else saved) - delta
        lost, whole = lost + float(missing.square().sum()), whole + float(delta.square().sum())
    assert exported.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert family.export(route, tmp_path / "all", rank=exported.exact_rank).relative_error < 2e-7
    family.check(route, tmp_path / "all")


def test_biases_beside_an_adapted_embedding_are_refused(family: Family, tmp_path: Path) -> None:
    embedding = family.adapter(**_named({"modules": ["embedding"]}, family))
    with pytest.raises(UnsupportedRouteError, match="either, and not both"):
        family.export(route_of("mixture", (family.adapter(lora_bias=True), 0.5), (embedding, 0.5)), tmp_path / "one")


def test_an_export_never_changes_the_base(family: Family, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in family.loaded.model.state_dict().items()}
    route = route_of("mixture", (family.adapter(init="pissa"), 0.5), (family.adapter(dora=True), 0.5))
    family.export(route, tmp_path / "one", rank=4)
    assert all(torch.equal(value, before[name]) for name, value in family.loaded.model.state_dict().items())


def _named(spec: dict[str, Any], family: Family) -> dict[str, Any]:
    """The family's own names of the modules."""
    own = FAMILIES[family.name]
    names = {"embedding": own.embedding, "norm": own.norms[0]}
    return {
        key: [names.get(name, name) for name in value] if key in ("modules", "modules_to_save") else value
        for key, value in spec.items()
    }
