"""Admission: strangers' adapters fail closed.

One pass over the files decides whether the adapter can be served exactly: the configuration is understood, every tensor
belongs to a module of the base model and has its other half, shapes agree with configured rank and base model, all
values are finite. No torch, nothing executed, no base weights loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lora_hub_sdk.errors import (
    BaseModelMismatchError,
    DamagedWeightsError,
    MissingWeightsError,
    NonFiniteWeightsError,
    ShapeMismatchError,
    UnmatchedTensorsError,
    UnsafeWeightsError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry.adapter_config import (
    CONFIG_FILE,
    AdapterConfig,
    adapter_config_from_bytes,
    read_config_bytes,
)

WEIGHTS_FILE: Final = "adapter_model.safetensors"
#: PEFT's name of a factor: ``base_model.model.<module path>.lora_A.weight``.
FACTOR_KEY: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SPECIAL: Final = {
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_B.bias": "lora_bias",
    "modules_to_save": "modules_to_save",
}

#: (out_features, in_features) of every linear module of a base model, by module path.
ModuleShapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that no adapter may pass."""

    max_bytes: int = 4 << 30
    max_rank: int = 512


@dataclass(frozen=True, slots=True)
class Admitted:
    """An adapter whose files were found good. ``modules`` are the paths it has factors for, sorted."""

    config: AdapterConfig
    digest: str
    modules: tuple[str, ...]
    size_bytes: int

    @property
    def max_rank(self) -> int:
        return max(self.config.rank(module) for module in self.modules)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The short names ("q_proj") of the modules."""
        return tuple(sorted({module.rpartition(".")[2] for module in self.modules}))


def content_digest(config: bytes, weights: bytes) -> str:
    """sha256 over configuration and weights, each preceded by its length: the identity of an adapter's content."""
    digest = hashlib.sha256()
    for part in (config, weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def admit(
    folder: Path,
    *,
    source: str,
    shapes: ModuleShapes,
    pickle_files: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> Admitted:
    """Check an adapter's files against its configuration and the base model's module shapes.

    Digest and verdict come from the same bytes, read once.

    Args:
        pickle_files: names of pickled weights seen beside, for a telling error.

    Raises:
        AdmissionError: the subclass names what is wrong; nothing was kept.
    """
    limits = limits or Limits()
    config_bytes = read_config_bytes(folder, source)
    config = adapter_config_from_bytes(config_bytes, source)
    weights = read_weights(folder, source=source, pickle_files=pickle_files, limits=limits)
    modules = _TensorCheck(config, shapes, source, limits).modules_of(_parse(weights, source))
    return Admitted(config, content_digest(config_bytes, weights), modules, len(weights))


def read_weights(
    folder: Path, *, source: str, pickle_files: tuple[str, ...] = (), limits: Limits | None = None
) -> bytes:
    """The bytes of ``adapter_model.safetensors``.

    Raises:
        MissingWeightsError, UnsafeWeightsError: there is no such file, or only a pickle.
        UnsupportedFeatureError: larger than the limit.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = pickle_files or tuple(file.name for file in sorted(folder.glob("adapter_model*.bin")))
        if pickles:
            raise UnsafeWeightsError(
                source,
                f"its weights are a pickle ({', '.join(pickles)}), which can run code; "
                f"ask its author for {WEIGHTS_FILE}, or convert it where you trust it",
            )
        raise MissingWeightsError(source, f"there is no {WEIGHTS_FILE}")
    size = path.stat().st_size
    if size > (limits or Limits()).max_bytes:
        raise UnsupportedFeatureError(source, "size in bytes", size)
    return path.read_bytes()


def check_base_model(config: AdapterConfig, expected: str, found: str, source: str) -> None:
    """Refuse an adapter of another base model than the one asked for; both names in canonical spelling."""
    if expected != found:
        raise BaseModelMismatchError(
            source,
            f"base_model={expected!r} was asked for, its {CONFIG_FILE} names {config.base_model!r}; "
            "leave base_model out, or register an adapter of that base",
        )


def _parse(weights: bytes, source: str) -> dict[str, dict[str, Any]]:
    import safetensors

    read: Any = safetensors.deserialize  # the extension carries no types
    try:
        return dict(read(weights))
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise DamagedWeightsError(source, f"{WEIGHTS_FILE} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _TensorCheck:
    """The rules that every tensor of one adapter must keep."""

    config: AdapterConfig
    shapes: ModuleShapes
    source: str
    limits: Limits

    def modules_of(self, tensors: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        """The modules that the tensors belong to, sorted, if all of them are good."""
        sides: dict[str, set[str]] = {}
        unmatched: list[str] = []
        for key in sorted(tensors):
            self._name_special(key)
            match = FACTOR_KEY.fullmatch(key)
            if match is None or match["module"] not in self.shapes:
                unmatched.append(key)
                continue
            sides.setdefault(match["module"], set()).add(match["side"])
            self._check_factor(key, tensors[key], match["module"], match["side"])
        if unmatched:
            raise UnmatchedTensorsError(self.source, unmatched, "tensors that match no linear module of the base model")
        if not sides:
            raise UnmatchedTensorsError(self.source, ["(none)"], "the file holds no LoRA tensors")
        halves = [module for module, found in sorted(sides.items()) if found != {"A", "B"}]
        if halves:
            raise UnmatchedTensorsError(self.source, halves, "modules with only one of lora_A and lora_B")
        return tuple(sorted(sides))

    def _name_special(self, key: str) -> None:
        for part, feature in _SPECIAL.items():
            if part in key:
                raise UnsupportedFeatureError(self.source, feature, key)

    def _check_factor(self, key: str, tensor: Mapping[str, Any], module: str, side: str) -> None:
        rank = self.config.rank(module)
        if rank > self.limits.max_rank:
            raise UnsupportedFeatureError(self.source, f"rank of {module}", rank)
        out_features, in_features = self.shapes[module]
        expected = [rank, in_features] if side == "A" else [out_features, rank]
        if list(tensor["shape"]) != expected:
            raise ShapeMismatchError(
                self.source,
                f"{key} has shape {list(tensor['shape'])}, expected {expected} "
                f"(rank {rank} by its configuration, {in_features} -> {out_features} in the base model)",
            )
        if not _finite(tensor["dtype"], tensor["data"], key, self.source):
            raise NonFiniteWeightsError(self.source, f"{key} holds NaN or infinity")


def _finite(dtype: str, data: bytes, key: str, source: str) -> bool:
    if dtype == "BF16":
        # numpy has no bfloat16; an exponent of all ones is NaN or infinity.
        bits = np.frombuffer(data, dtype="<u2")
        return bool(((bits & 0x7F80) != 0x7F80).all())
    if dtype in ("F16", "F32", "F64"):
        return bool(np.isfinite(np.frombuffer(data, dtype=f"<f{int(dtype[1:]) // 8}")).all())
    raise UnsupportedFeatureError(source, f"dtype of {key}", dtype)
