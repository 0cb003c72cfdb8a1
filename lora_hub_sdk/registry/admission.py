"""Admission: strangers' adapters fail closed.

One pass over the files decides whether the adapter can be served exactly: the configuration is understood, every tensor
belongs to a module of the base model and has its other half, shapes agree with configured rank and base model, all
values are finite, sizes and norms are those of an honest adapter, and it changes something. No torch, nothing executed,
no base weights loaded.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.errors import (
    BaseModelMismatchError,
    DamagedWeightsError,
    MissingWeightsError,
    NoEffectError,
    NonFiniteWeightsError,
    OutOfBoundsError,
    ShapeMismatchError,
    UnmatchedTensorsError,
    UnsafeWeightsError,
)
from lora_hub_sdk.registry.adapter_config import (
    CONFIG_FILE,
    AdapterConfig,
    config_object,
    config_values,
    printable,
    read_config_bytes,
    read_regular,
    refuse_features,
    shown,
    strict_json,
    unsupported,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Numbers = NDArray[np.float32] | NDArray[np.float64]

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
#: How numpy reads a dtype of safetensors. It has no bfloat16, the upper half of a float32.
_NUMPY: Final = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_WIDEST: Final = 8

#: (out_features, in_features) of every linear module of a base model, by module path.
ModuleShapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that no adapter may pass; an honest one is far below them all.

    Attributes:
        max_bytes: size of the weights' file.
        max_rank: rank of one module.
        max_scale: absolute value of alpha / r, or of alpha / sqrt(r) for rsLoRA, of one module.
        max_delta_norm: Frobenius norm of s * B A of one module. Real adapters of a small model have 0.2 to 2.3, a
            whole weight matrix of a large model some hundreds.
        max_abs: absolute value of one stored number; float16 holds no larger one.
        header_bytes: size of the weights' header, and what the file may have beyond the factors that the base model's
            modules and the configured ranks allow.
    """

    max_bytes: int = 4 << 30
    max_rank: int = 512
    max_scale: float = 1e4
    max_delta_norm: float = 1e3
    max_abs: float = 65504.0
    header_bytes: int = 8 << 20


@dataclass(frozen=True, slots=True)
class Admitted:
    """An adapter whose files were found good. ``modules`` are the paths it has factors for, sorted.

    ``max_delta_norm`` is the largest Frobenius norm of a module's delta s * B A.
    """

    config: AdapterConfig
    digest: str
    modules: tuple[str, ...]
    size_bytes: int
    max_delta_norm: float = 0.0

    @property
    def max_rank(self) -> int:
        return max(self.config.rank(module) for module in self.modules)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The short names ("q_proj") of the modules."""
        return short_names(self.modules)


def short_names(modules: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of module paths, each once, sorted."""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))


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
    return Examination(folder, source, shapes, limits or Limits(), pickle_files).run()


def read_weights(
    folder: Path, *, source: str, pickle_files: tuple[str, ...] = (), limits: Limits | None = None
) -> bytes:
    """The bytes of ``adapter_model.safetensors``.

    Raises:
        MissingWeightsError, UnsafeWeightsError: there is no such file, or only a pickle.
        OutOfBoundsError: larger than the limit.
        DamagedWeightsError: it cannot be read.
    """
    return _read(folder, _weights_size(folder, source, pickle_files, limits or Limits()), source)


def check_base_model(config: AdapterConfig, expected: str, found: str, source: str) -> None:
    """Refuse an adapter of another base model than the one asked for; both names in canonical spelling."""
    if expected != found:
        raise BaseModelMismatchError(
            source,
            f"base_model={expected!r} was asked for, its {CONFIG_FILE} names {config.base_model!r}; "
            "leave base_model out, or register an adapter of that base",
        )


@dataclass(slots=True)
class Examination:
    """One adapter's way through the policy: how far it came, and what was learned on the way.

    ``passed`` maps the names of the checks that it passed to a line about each. What was not learned is None or empty.
    """

    folder: Path
    source: str
    shapes: ModuleShapes
    limits: Limits
    pickle_files: tuple[str, ...] = ()
    passed: dict[str, str] = field(default_factory=dict)
    config: AdapterConfig | None = None
    digest: str | None = None
    size_bytes: int | None = None
    tensors: int | None = None
    parameters: int | None = None
    dtypes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    norms: dict[str, float] = field(default_factory=dict)

    def run(self) -> Admitted:
        """The whole policy, in its order: what is cheap and does not read the weights comes first.

        Raises:
            AdmissionError: the first rule that the adapter breaks.
        """
        config_bytes = read_config_bytes(self.folder, self.source)
        size = self.size_bytes = _weights_size(self.folder, self.source, self.pickle_files, self.limits)
        self.passed["files"] = f"{CONFIG_FILE} and {WEIGHTS_FILE}, {size} bytes"
        raw = config_object(config_bytes, self.source)
        config = self.config = config_values(raw, self.source)
        self.passed["configuration"] = f"rank {config.r}, alpha {config.alpha:g}"
        refuse_features(raw, self.source)
        self.passed["features"] = "plain LoRA"
        self._check_size(size, config)
        weights = _read(self.folder, size, self.source)
        self.digest = digest = content_digest(config_bytes, weights)
        tensors = _parse(weights, self.source, self.limits)
        del weights  # the parser made a copy
        self.tensors = len(tensors)
        self.parameters = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
        self.dtypes = tuple(sorted({str(tensor["dtype"]) for tensor in tensors.values()}))
        pairs = self._pairs(tensors, config)
        self.modules = tuple(pairs)
        self.passed["tensors"] = f"{len(tensors)} tensors of {len(pairs)} modules"
        del tensors
        for module, pair in pairs.items():
            self._check_shapes(module, pair, config.rank(module))
        self.passed["shapes"] = "those of the base model and of the configured ranks"
        largest = self._measure(pairs, config)
        self.passed["finite"] = "no NaN, no infinity"
        self._check_bounds(largest, config)
        norm = max(self.norms.values())
        self.passed["bounds"] = f"largest norm of a delta {norm:.3g}"
        # Below this, float32 has lost the value.
        if norm < np.finfo(np.float32).tiny:
            raise NoEffectError(self.source, "every delta is zero; it was not trained, or its lora_alpha is 0")
        self.passed["effect"] = "it changes the base model"
        return Admitted(config, digest, self.modules, size, norm)

    def _check_size(self, size: int, config: AdapterConfig) -> None:
        """Before a byte is read: no file is larger than its factors for all modules could make it."""
        numbers = sum(
            min(config.rank(module), self.limits.max_rank) * sum(shape) for module, shape in self.shapes.items()
        )
        most = numbers * _WIDEST + self.limits.header_bytes
        if size > most:
            raise OutOfBoundsError(
                self.source, f"size of {WEIGHTS_FILE} (by its ranks, the base model and header_bytes)", size, most
            )

    def _pairs(self, tensors: Mapping[str, Mapping[str, Any]], config: AdapterConfig) -> dict[str, dict[str, Any]]:
        """The tensors by module and side, modules sorted, if each has its place and its other half."""
        pairs: dict[str, dict[str, Any]] = {}
        unmatched: list[str] = []
        for key in sorted(tensors):
            for part, feature in _SPECIAL.items():
                if part in key:
                    raise unsupported(self.source, feature, key)
            match = FACTOR_KEY.fullmatch(key)
            if match is None or match["module"] not in self.shapes:
                unmatched.append(key)
                continue
            if tensors[key]["dtype"] not in _NUMPY:
                raise unsupported(self.source, f"dtype of {key}", tensors[key]["dtype"])
            pairs.setdefault(match["module"], {})[match["side"]] = tensors[key]
        modules = sorted(pairs)
        self._refuse(unmatched, "tensors that match no linear module of the base model")
        self._refuse([] if pairs else ["(none)"], "the file holds no LoRA tensors")
        self._refuse([m for m in modules if len(pairs[m]) < 2], "modules with only one of lora_A and lora_B")
        # PEFT would drop them without a word: which adapter was meant, the one of the tensors or of the configuration?
        self._refuse(
            [m for m in modules if not config.selection.covers(m)],
            "modules with tensors that target_modules, exclude_modules and layers_to_transform leave out",
        )
        return {module: pairs[module] for module in modules}

    def _refuse(self, names: list[str], why: str) -> None:
        if names:
            raise UnmatchedTensorsError(self.source, [printable(name) for name in names], why)

    def _check_shapes(self, module: str, pair: Mapping[str, Any], rank: int) -> None:
        if rank > self.limits.max_rank:
            raise OutOfBoundsError(self.source, f"rank of {module}", rank, self.limits.max_rank)
        out_features, in_features = self.shapes[module]
        for side, expected in (("A", [rank, in_features]), ("B", [out_features, rank])):
            found = list(pair[side]["shape"])
            if found != expected:
                raise ShapeMismatchError(
                    self.source,
                    f"{_key(module, side)} has shape {shown(found)}, expected {expected} "
                    f"(rank {rank} by its configuration, {in_features} -> {out_features} in the base model)",
                )

    def _measure(self, pairs: dict[str, dict[str, Any]], config: AdapterConfig) -> dict[str, float]:
        """The largest absolute value of every factor, by key, and the norms. Lets go of each pair when done with it."""
        largest: dict[str, float] = {}
        for module in self.modules:
            pair = pairs.pop(module)
            a, b = _numbers(pair["A"]), _numbers(pair["B"])
            for side, values in (("A", a), ("B", b)):
                key = _key(module, side)
                largest[key] = max(float(values.max()), -float(values.min()))
                if not math.isfinite(largest[key]):
                    raise NonFiniteWeightsError(self.source, f"{key} holds NaN or infinity")
            self.norms[module] = delta_norm(a, b, config.scale(module))
        return largest

    def _check_bounds(self, largest: Mapping[str, float], config: AdapterConfig) -> None:
        for what, found, limit in self._bounds(largest, config):
            if not found <= limit:  # nor is NaN within a limit
                raise OutOfBoundsError(self.source, what, found, limit)

    def _bounds(self, largest: Mapping[str, float], config: AdapterConfig) -> Iterator[tuple[str, float, float]]:
        scale = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
        for module in self.modules:
            yield f"{scale} of {module}", abs(config.scale(module)), self.limits.max_scale
        for key, value in largest.items():
            yield f"largest value of {key}", value, self.limits.max_abs
        for module, norm in self.norms.items():
            yield f"norm of the delta of {module}", norm, self.limits.max_delta_norm


def delta_norm(a: _Numbers, b: _Numbers, scale: float) -> float:
    """Frobenius norm of scale * b a, for a (r, d_in) and b (d_out, r), without forming the product.

    It is the sum over a aT * bT b, two matrices of r x r, in the precision that the factors are given in.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squared = ((a @ a.T).astype(np.float64) * (b.T @ b)).sum()
        # Rounding may leave a trace below zero.
        return abs(scale) * math.sqrt(abs(float(squared)))


def _weights_size(folder: Path, source: str, pickle_files: tuple[str, ...], limits: Limits) -> int:
    path = folder / WEIGHTS_FILE
    try:
        if not path.is_file():
            pickles = pickle_files or tuple(sorted(file.name for file in folder.glob("adapter_model*.bin")))
            raise _missing(pickles, source)
        size = path.stat().st_size
    except OSError as error:
        raise DamagedWeightsError(source, f"{WEIGHTS_FILE} cannot be read: {error.strerror or error}") from error
    if size > limits.max_bytes:
        raise OutOfBoundsError(source, f"size of {WEIGHTS_FILE} in bytes", size, limits.max_bytes)
    return size


def _missing(pickles: tuple[str, ...], source: str) -> MissingWeightsError:
    if not pickles:
        return MissingWeightsError(source, f"there is no {WEIGHTS_FILE}")
    return UnsafeWeightsError(
        source,
        f"its weights are a pickle ({', '.join(map(printable, pickles[:5]))}), which can run code; "
        f"ask its author for {WEIGHTS_FILE}, or convert it where you trust it",
    )


def _read(folder: Path, size: int, source: str) -> bytes:
    try:
        weights = read_regular(folder / WEIGHTS_FILE, size + 1)
    except OSError as error:
        raise DamagedWeightsError(source, f"{WEIGHTS_FILE} cannot be read: {error.strerror or error}") from error
    if len(weights) != size:
        raise DamagedWeightsError(source, f"{WEIGHTS_FILE} changed while it was read; try again")
    return weights


def _parse(weights: bytes, source: str, limits: Limits) -> dict[str, dict[str, Any]]:
    import safetensors

    header = int.from_bytes(weights[:8], "little")
    if header > limits.header_bytes:
        raise DamagedWeightsError(
            source, f"{WEIGHTS_FILE} claims a header of {header} bytes, the limit is {limits.header_bytes}"
        )
    read: Any = safetensors.deserialize  # the extension carries no types
    try:
        tensors = dict(read(weights))
        # The library takes the last of two tensors of one name, other readers the first.
        strict_json(weights[8 : 8 + header])
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError) as error:
        raise DamagedWeightsError(source, f"{WEIGHTS_FILE} cannot be read: {printable(str(error))}") from error
    return tensors


def _key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _numbers(tensor: Mapping[str, Any]) -> _Numbers:
    """A tensor's values in a dtype that numpy can multiply quickly: float64 stays, all others become float32."""
    values: Any = np.frombuffer(tensor["data"], dtype=_NUMPY[tensor["dtype"]]).reshape(tensor["shape"])
    if tensor["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    wide: _Numbers = values if tensor["dtype"] == "F64" else values.astype(np.float32, copy=False)
    return wide
