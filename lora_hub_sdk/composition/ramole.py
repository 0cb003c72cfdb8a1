"""RAMoLE's gate (arXiv 2406.16989): a small LoRA at each module that scores a row's adapters, and its one file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.tensor_file import read_gate, read_tensors, tensor_bytes, write_whole
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

#: What such a file says it is.
FORMAT: Final = "lora-hub-ramole"
_VERSION: Final = "1"
_A, _B = ".router_a.weight", ".router_b.weight"


@dataclass(frozen=True)
class RouterLora:
    """The gate of one module: ``a`` (width, d_in) makes queries of inputs, ``b`` (d_out, width) keys of outputs."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Ramole:
    """Weights for each token, module and adapter of a row; a ``TokenGate``.

    With member i's output v_i = s_i B_i A_i x, the query q = a x and the keys k_i = b^T v_i, the weights are
    softmax(<q, k_i> / sqrt(width)) over the row's members.

    Attributes:
        base_model: canonical name of the base model that it was trained for.
        routers: by module path, float32 on the CPU.
        trained: the contents of the adapters that it was trained on, digest by name. It serves others too.
        training: how it was trained and how that went, as JSON can hold it.

    Raises:
        ConfigurationError: no routers, or routers whose widths differ.
    """

    base_model: str
    routers: Mapping[str, RouterLora] = field(repr=False)
    trained: Mapping[str, str] = field(default_factory=dict, repr=False)
    training: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        widths = {size for router in self.routers.values() for size in (router.a.shape[0], router.b.shape[1])}
        if len(widths) != 1 or not min(widths):
            raise ConfigurationError(f"a gate needs routers of one width above 0; found widths {sorted(widths)}")

    @property
    def strategy(self) -> str:
        """The one that it serves."""
        return "ramole"

    @cached_property
    def width(self) -> int:
        """How long queries and keys are."""
        return next(iter(self.routers.values())).a.shape[0]

    @cached_property
    def digest(self) -> str:
        """sha256 of what ``save`` writes."""
        return hashlib.sha256(self._content()).hexdigest()

    def module(self, path: str) -> tuple[Tensor, Tensor] | None:
        """``a`` and ``b`` of a module, or None where it has no router."""
        router = self.routers.get(path)
        return None if router is None else (router.a, router.b)

    def weights(self, scores: Tensor) -> Tensor:
        """As ``gate_weights``, at this gate's width."""
        return gate_weights(scores, self.width)

    def check_fits(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a base model whose linear modules have not the shapes (d_out, d_in) of the routers.

        Raises:
            ConfigurationError: names the first module that does not fit.
        """
        for path, router in self.routers.items():
            shape = (router.b.shape[0], router.a.shape[1])
            if shapes.get(path) != shape:
                found = f"has {tuple(shapes[path])}" if path in shapes else "lacks it"
                raise ConfigurationError(
                    f"the gate was trained for base model {self.base_model!r}: its router {path!r} is for a linear "
                    f"module of (d_out, d_in) {shape}, this base model {found}"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file; what was there before is replaced as a whole or not at all."""
        write_whole(Path(path), self._content())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ramole:
        """Read what ``save`` wrote.

        Raises:
            ConfigurationError: the file cannot be read, is no gate, is one of another version, or is damaged.
        """
        return read_gate(path, cls._of, "hub.train_gate()")

    @classmethod
    def _of(cls, content: bytes) -> Ramole:
        tensors, told = read_tensors(content)
        if told.get("format") != FORMAT:
            raise ConfigurationError("this safetensors file is no RAMoLE gate")
        if told.get("version") != _VERSION:
            raise ConfigurationError(f"format version {told.get('version')!r}, this package reads {_VERSION!r}")
        paths = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
        if sorted(tensors) != sorted(name for path in paths for name in (path + _A, path + _B)):
            raise ConfigurationError("a router has only one of its factors, or there are tensors of something else")
        for name, tensor in tensors.items():
            if tensor.dim() != 2 or not tensor.isfinite().all():
                raise ConfigurationError(f"tensor {name!r} is no matrix of finite numbers")
        try:
            base_model, facts = told["base_model"], json.loads(told["facts"])
            trained, training = facts["trained"], facts["training"]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"its metadata are incomplete ({error!r})") from error
        routers = {path: RouterLora(tensors[path + _A].float(), tensors[path + _B].float()) for path in sorted(paths)}
        gate = cls(base_model, routers, trained, training)
        gate.__dict__["digest"] = hashlib.sha256(content).hexdigest()
        return gate

    def _content(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        for path, router in self.routers.items():
            tensors |= {path + _A: router.a, path + _B: router.b}
        facts = json.dumps({"trained": dict(self.trained), "training": dict(self.training)}, sort_keys=True)
        told = {"format": FORMAT, "version": _VERSION, "base_model": self.base_model, "facts": facts}
        return tensor_bytes(tensors, told)


def gate_weights(scores: Tensor, width: int) -> Tensor:
    """softmax(scores / sqrt(width)) over the last dimension, float32; -inf marks places without a member.

    Where no place has one, all weights are 0. Differentiable everywhere.
    """
    present = scores > -math.inf
    # A softmax over nothing would be 0 / 0, in its gradient too.
    some = scores.masked_fill(~present.any(-1, keepdim=True), 0.0)
    return (some.float() / math.sqrt(width)).softmax(-1).masked_fill(~present, 0.0)


def gate_scores(hidden: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """<q, k_i> from what the mixture computes anyway; the outputs v_i are never made.

    k_i = b^T (s_i B_i h_i) = (b^T s_i B_i) h_i, so <q, k_i> is the sum over member i's ranks of (q^T b^T s_i B_i) h_i.

    Args:
        hidden: (b, l, k, r) each member's A_i x, ranks filled up with zeros.
        query: (b, l, width).
        keys: (b, k, r, width), each rank's column of s_i B_i times the gate's b.

    Returns:
        (b, l, k), float32; 0 where a row has fewer members.
    """
    b, k, r, width = keys.shape
    along = (query @ keys.reshape(b, k * r, width).transpose(1, 2)).view(hidden.shape)
    return (along.float() * hidden.float()).sum(-1)
