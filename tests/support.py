"""Small builders and the dense reference: no LoRA code, just a model with other weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lora_hub_sdk.engine.shapes import module_layout
from lora_hub_sdk.testing import raw_factors, tiny_base, unregistered
from lora_hub_sdk.types import Adapter, Averaged, Member, Route

# Reading a file again for each of 210 modules would be most of the tests' time.
_layout = functools.cache(module_layout)
_factors = functools.cache(raw_factors)


def adapter_at(folder: Path, base: Path, *, id: int = 1) -> Adapter:  # noqa: A002
    """An admitted adapter without a registry."""
    return unregistered(folder, _layout(base), id=id)


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


@dataclass
class _Inference:
    """What one adapter does at one module, y = g * W x + b a x + shift, read from its files by the definitions.

    ``a`` is (r, d_in); ``b`` (d_out, r) has scale and gain in it. ``own`` replaces parameters as the model stores them.
    """

    a: Tensor
    b: Tensor
    gain: Tensor
    shift: Tensor
    own: dict[str, Tensor]


def dense_deltas(route: Route, model: Any) -> dict[str, Tensor]:
    """What a route adds to each parameter of a float32 model, as the model stores them, by the definitions.

    Outputs averaged: sum of w_i ((g_i - 1) W + s_i B_i A_i), and so for the rest. Parameters averaged: the gains', and
    (sum of w_i s_i B_i)(sum of w_i A_i), ranks padded.
    """
    deltas: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        tied = _tied_with(model, module)
        adapters = [(member.weight, member.adapter.folder) for member in route.members]
        held = [(w, folder) for w, folder in adapters if path in _factors(folder) or _own(folder, path, tied)]
        if not held:
            continue
        if module.weight.dim() == 1:  # a norm
            nothing = torch.zeros(0)
            found = [
                (w, _Inference(nothing, nothing, nothing, nothing, _own(folder, path, tied))) for w, folder in held
            ]
        else:
            found = [(w, _inference(folder, path, module, tied)) for w, folder in held]
            change = _sum(w * (one.gain - 1)[:, None] * _rows(module) for w, one in found)
            if route.averaged == "outputs":
                change = change + _sum(w * one.b @ one.a for w, one in found)
            else:
                rank = max(len(one.a) for _, one in found)
                mean_b = _sum(w * _padded(one.b.T, rank).T for w, one in found)
                change = change + mean_b @ _sum(w * _padded(one.a, rank) for w, one in found)
            deltas[f"{path}.weight"] = change.T if _is_transposed(module) else change
            if any(one.shift.any() for _, one in found):
                deltas[f"{path}.bias"] = _sum(w * one.shift for w, one in found)
        for w, one in found:
            for name, value in one.own.items():
                change = w * (value - getattr(module, name))
                deltas[f"{path}.{name}"] = deltas.get(f"{path}.{name}", torch.zeros(())) + change
    return deltas


@functools.cache
def _stored(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and float32 tensors of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    raw = json.loads((folder / "adapter_config.json").read_text())
    return raw, {key.removeprefix("base_model.model."): tensor.float() for key, tensor in tensors.items()}


def _tied_with(model: Any, module: Any) -> str:
    """The path of the other module that has this one's weight: of embedding and head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if module not in ends or ends[0].weight is not ends[1].weight:
        return ""
    return str(next(path for path, other in model.named_modules() if other in ends and other is not module))


def _own(folder: Path, path: str, tied: str) -> dict[str, Tensor]:
    """The parameters of its own that an adapter brings for a module.

    A copy of the base's weight is one only where the module is tied to the one that has the copy.
    """
    tensors = _stored(folder)[1]
    found = {name: tensors[f"{path}.{name}"] for name in ("weight", "bias") if f"{path}.{name}" in tensors}
    if f"{path}.base_layer.bias" in tensors:
        found["bias"] = tensors[f"{path}.base_layer.bias"]
    if f"{tied}.base_layer.weight" in tensors and path not in _factors(folder):
        found.setdefault("weight", tensors[f"{tied}.base_layer.weight"])
    return found


def _inference(folder: Path, path: str, module: Any, tied: str) -> _Inference:
    raw, tensors = _stored(folder)
    weight = _rows(module)
    d_out, d_in = weight.shape
    none = a, b = torch.zeros(0, d_in), torch.zeros(d_out, 0)
    gain, shift = torch.ones(d_out), torch.zeros(d_out)
    # Where PEFT stored the weight that it trained on, this is what the factors belong to.
    copied = tensors.get(f"{path}.base_layer.weight")
    if copied is not None:
        weight = copied.T if _is_transposed(module) else copied
    if path in _factors(folder):
        a, b, scale = _factors(folder)[path]
        b = scale * b
        rank, init = len(a), raw.get("init_lora_weights")
        if copied is not None or isinstance(module, torch.nn.Embedding):
            init = None
        if init == "pissa":
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            root = (values[:rank] / scale).sqrt()
            a, b = torch.cat([a, root[:, None] * right[:rank]]), torch.cat([b, -scale * left[:, :rank] * root], 1)
        elif init == "olora":
            left, right = torch.linalg.qr(module.weight.data)  # as it is stored: PEFT does not turn it
            a0, b0 = (left[:, :rank].T, right[:rank].T) if _is_transposed(module) else (right[:rank], left[:, :rank])
            a, b = torch.cat([a, a0]), torch.cat([b, -scale * b0], 1)
        if raw.get("use_dora"):
            gain = tensors[f"{path}.lora_magnitude_vector"] / (weight + b @ a).norm(dim=1)
            b = gain[:, None] * b
        if f"{path}.lora_B.bias" in tensors:
            shift = scale * tensors[f"{path}.lora_B.bias"]
    if copied is not None and (copied != module.weight).any():
        whole = gain[:, None] * weight + b @ a
        own = {"weight": whole.T if _is_transposed(module) else whole}
        return _Inference(*none, torch.ones(d_out), shift, own | _own(folder, path, tied))
    return _Inference(a, b, gain, shift, _own(folder, path, tied))


def _rows(module: Any) -> Tensor:
    """A module's weight as (d_out, d_in)."""
    weight: Tensor = module.weight.data
    return weight.T if _is_transposed(module) else weight


def _is_transposed(module: Any) -> bool:
    return isinstance(module, (Conv1D, torch.nn.Embedding))


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows, torch.zeros(count - len(rows), rows.shape[1])])


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
        return Patched(self.model, dense_deltas(route, self.model))


class Patched:
    """Parameters with deltas inside a block, and exactly the old ones after it; a tied weight changes at one place."""

    def __init__(self, model: Any, deltas: dict[str, Tensor]) -> None:
        self._deltas = {
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]): delta
            for name, delta in deltas.items()
        }

    def __enter__(self) -> None:
        self._before = {place: getattr(*place) for place in self._deltas}
        for (module, name), delta in self._deltas.items():
            own = self._before[module, name]
            setattr(module, name, torch.nn.Parameter(delta if own is None else own + delta, requires_grad=False))

    def __exit__(self, *_: object) -> None:
        for (module, name), own in self._before.items():
            setattr(module, name, own)


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
