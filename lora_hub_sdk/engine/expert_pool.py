"""The adapters that a training or a measurement is about, with their factors fitted to the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.fitting import Fitting
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Adapter

if TYPE_CHECKING:
    from lora_hub_sdk.composition.expert_gate import ExpertGate
    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.composition.ramole import Ramole
    from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings
    from lora_hub_sdk.engine.engine import Engine

# Inside the protocol ``list`` is a method.
Adapters = list[Adapter]
Reference = str | os.PathLike[str]
_Gate = TypeVar("_Gate", "Ramole", "ExpertGate")


class AdapterSource(Protocol):
    """Where adapters and their base model come from: a ``LoraHub``."""

    def list(self, *, namespace: str | None, base_model: Reference | None) -> Adapters: ...
    def engine(self, base_model: Reference, settings: ModelSettings | None = None) -> Engine: ...


@dataclass
class Experts:
    """Adapters by name, in their order, with factors; and why others are not among them."""

    base_model: str
    adapters: dict[str, Adapter] = field(default_factory=dict)
    factors: list[AdapterFactors] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, str]:
        """By name."""
        return {name: adapter.digest for name, adapter in self.adapters.items()}


def open_experts(
    hub: AdapterSource,
    base: BaseModel,
    names: Sequence[str] | None,
    *,
    base_model: Reference,
    namespace: str,
    distinct: bool = True,
    fused: bool = False,
) -> Experts:
    """Adapters in service whose outputs can be weighed.

    Args:
        names: in this order; None is every one that can be weighed, by name.
        distinct: take each content once.
        fused: their factors will be averaged, and not their outputs.

    Raises:
        ConfigurationError: a name twice or of no adapter in service for the base model; where names are given, an
            adapter that cannot be weighed, or that has the content of another one.
    """
    active = {one.name: one for one in hub.list(namespace=namespace, base_model=base_model) if one.state == "active"}
    found = Experts(next((one.base_model for one in active.values()), str(base_model)))
    fitting = Fitting(base.modules, embedding=base.embedding)
    contents: dict[str, str] = {}
    for name in sorted(active) if names is None else names:
        if name in found.adapters:
            raise ConfigurationError(f"adapter {name!r} is named twice")
        if name not in active:
            raise ConfigurationError(
                f"no adapter {name!r} for base model {found.base_model!r} is in service in namespace {namespace!r}"
            )
        adapter = active[name]
        factors = None
        if distinct and adapter.digest in contents:
            why: str | None = f"it has the content of {contents[adapter.digest]!r}"
        else:
            factors = fitting.fit(load_factors(adapter))
            why = unweighable(factors, base.shapes) or (unfusable(factors) if fused else None)
        if why is not None and names is not None:
            raise ConfigurationError(f"adapter {name!r} cannot be one of these: {why}")
        if why is not None or factors is None:
            found.skipped[name] = str(why)
            continue
        contents[adapter.digest] = name
        found.adapters[name] = adapter
        found.factors.append(factors)
    return found


def unweighable(factors: AdapterFactors, shapes: Mapping[str, Any]) -> str | None:
    """Why a gate cannot weigh an adapter's effect by tokens, or None."""
    if factors.saved:
        return f"it replaces the parameters of {next(iter(factors.saved))} (modules_to_save)"
    for path, module in factors.modules.items():
        if path not in shapes:
            return f"it adapts {path}, which is no linear module"
        if module.gain is not None or module.magnitude is not None:
            return f"it scales the base's own output at {path} (DoRA)"
        if module.shift is not None:
            return f"it has a bias at {path}"
    return None


def unfusable(factors: AdapterFactors) -> str | None:
    """Why an adapter's A and B cannot be averaged with others' apart, or None."""
    return "it was trained by PiSSA or OLoRA, and its A and B are not known apart" if factors.converted else None


def new_file(output: Reference) -> Path:
    """Where a gate will be written.

    Raises:
        ConfigurationError: its folder does not exist.
    """
    file = Path(output).absolute()
    if not file.parent.is_dir():
        raise ConfigurationError(f"output={str(file)!r}: there is no folder {str(file.parent)!r}")
    return file


def finished(file: Path, load: Callable[[Path], _Gate], key: str) -> _Gate | None:
    """The gate that this very training wrote before.

    Raises:
        ConfigurationError: the file holds something else.
    """
    if not file.exists():
        return None
    held = load(file)
    if held.training.get("key") != key:
        raise ConfigurationError(
            f"output={str(file)!r} holds the gate of another training; choose another file, or remove it"
        )
    return held
