"""Small builders and the dense reference: no LoRA code, just weights with the deltas added."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_hub_sdk.engine.shapes import module_shapes
from lora_hub_sdk.testing import raw_factors, tiny_base, unregistered
from lora_hub_sdk.types import Adapter, Averaged, Member, Route

# Reading a file again for each of 210 modules would be most of the tests' time.
_shapes = functools.cache(module_shapes)
_factors = functools.cache(raw_factors)


def adapter_at(folder: Path, base: Path, *, id: int = 1) -> Adapter:  # noqa: A002
    """An admitted adapter without a registry."""
    return unregistered(folder, _shapes(base), id=id)


def bare_adapter(name: str, digest: str | None = None) -> Adapter:
    """An adapter without files, for decisions that never look at them."""
    digest = digest or name.ljust(64, "0")
    when = datetime(2026, 1, 1, tzinfo=UTC)
    return Adapter(
        1, name, "default", f"user/{name}", digest[:40], digest, "base", 4, 8.0, ("q_proj",), 10, None, None, (),
        Path("/nowhere"), 0, when, when,
    )  # fmt: skip


def route_of(strategy: str, *members: tuple[Adapter, float]) -> Route:
    """A route with given weights."""
    averaged: Averaged = "parameters" if strategy == "fusion" else "outputs"
    return Route(strategy, averaged, tuple(Member(adapter, weight) for adapter, weight in members))


def dense_deltas(route: Route, base: Path) -> dict[str, Tensor]:
    """What a route adds to each weight of the base model, as dense float32 matrices, by the definitions.

    Outputs averaged: sum of w_i s_i B_i A_i. Parameters averaged: (sum of w_i s_i B_i)(sum of w_i A_i), ranks padded.
    """
    deltas = {}
    for module in _shapes(base):
        found = [(member.weight, _factors(member.adapter.folder).get(module)) for member in route.members]
        present = [(weight, *factors) for weight, factors in found if factors is not None]
        if not present:
            continue
        if route.averaged == "outputs":
            deltas[module] = sum((weight * scale * (b @ a) for weight, a, b, scale in present), torch.zeros(()))
            continue
        rank = max(a.shape[0] for _, a, _, _ in present)
        mean_a = torch.zeros(rank, present[0][1].shape[1])
        mean_b = torch.zeros(present[0][2].shape[0], rank)
        for weight, a, b, scale in present:
            mean_a[: a.shape[0]] += weight * a
            mean_b[:, : b.shape[1]] += weight * scale * b
        deltas[module] = mean_b @ mean_a
    return deltas


@dataclass
class DenseReference:
    """A plain model whose weights carry one route's deltas, one prompt at a time, never any padding."""

    base: Path
    model: Any

    def logits(self, route: Route, ids: Sequence[int]) -> Tensor:
        """Logits (vocabulary,) after the last token."""
        with torch.inference_mode(), self._with(route):
            output: Tensor = self.model(torch.tensor([ids])).logits[0, -1]
            return output.clone()

    def greedy(self, route: Route, ids: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` greedy tokens by transformers' own generate."""
        with torch.inference_mode(), self._with(route):
            whole = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
            )
        tokens: list[int] = whole[0, len(ids) :].tolist()
        return tokens

    def _with(self, route: Route) -> Any:
        return _Patched(self.model, dense_deltas(route, self.base))


class _Patched:
    """Weights with deltas inside a block, and exactly the old ones after it."""

    def __init__(self, model: Any, deltas: dict[str, Tensor]) -> None:
        self._weights = {path: model.get_submodule(path).weight for path in deltas}
        self._deltas = deltas

    def __enter__(self) -> None:
        self._before = {path: weight.data for path, weight in self._weights.items()}
        for path, weight in self._weights.items():
            weight.data = weight.data + self._deltas[path]

    def __exit__(self, *_: object) -> None:
        for path, weight in self._weights.items():
            weight.data = self._before[path]


def endless_base(folder: Path) -> Path:
    """A tiny model that never ends a text by itself: the logit of its end mark is 0, and others are above."""
    tiny_base(folder, context=40_000)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][json.loads((folder / "config.json").read_text())["eos_token_id"]] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, as a share of the largest expected value."""
    return float((found - expected).abs().max().detach() / expected.abs().max().detach())
