"""Admission: strangers' adapters fail closed.

One pass over the files decides whether the adapter can be served exactly: the configuration is understood, every tensor
belongs to a module of the base model and is one that the configuration announces, none is missing, shapes agree with
configured rank and base model, all values are finite, sizes and norms are those of an honest adapter, and it changes
something. No torch, nothing executed, no base weights loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
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
from lora_hub_sdk.registry.layout import BaseLayout
from lora_hub_sdk.registry.tensor_keys import BASE_PARTS, FACTOR_PARTS, place_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Numbers = NDArray[np.float32] | NDArray[np.float64]

WEIGHTS_FILE: Final = "adapter_model.safetensors"
#: How numpy reads a dtype of safetensors. It has no bfloat16, the upper half of a float32.
_NUMPY: Final = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_WIDEST: Final = 8
#: A tensor as safetensors gives it: dtype, shape, data.
_Tensor = Mapping[str, Any]


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
        header_bytes: size of the weights' header, and what the file may have beyond what the base model's modules and
            the configuration allow.
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

    ``max_delta_norm`` is the largest Frobenius norm of a module's delta s * B A. ``saved`` are the paths of which it
    brings parameters of its own, sorted.
    """

    config: AdapterConfig
    digest: str
    modules: tuple[str, ...]
    size_bytes: int
    max_delta_norm: float = 0.0
    saved: tuple[str, ...] = ()

    @property
    def max_rank(self) -> int:
        """The largest rank as it is served: what PiSSA and OLoRA took from the base is given back by as much again."""
        largest = max((self.config.rank(module) for module in self.modules), default=0)
        return largest if self.config.init == "plain" else 2 * largest

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The short names ("q_proj") of the modules that it changes."""
        return short_names((*self.modules, *self.saved))


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
    layout: BaseLayout,
    pickle_files: tuple[str, ...] = (),
    limits: Limits | None = None,
) -> Admitted:
    """Check an adapter's files against its configuration and the base model's layout.

    Digest and verdict come from the same bytes, read once.

    Args:
        pickle_files: names of pickled weights seen beside, for a telling error.

    Raises:
        AdmissionError: the subclass names what is wrong; nothing was kept.
    """
    return Examination(folder, source, layout, limits or Limits(), pickle_files).run()


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
    layout: BaseLayout
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
    saved: tuple[str, ...] = ()
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
        self.passed["features"] = _told(config)
        self._check_size(size, config)
        weights = _read(self.folder, size, self.source)
        self.digest = digest = content_digest(config_bytes, weights)
        tensors = _parse(weights, self.source, self.limits)
        del weights  # the parser made a copy
        self.tensors = len(tensors)
        self.parameters = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
        self.dtypes = tuple(sorted({str(tensor["dtype"]) for tensor in tensors.values()}))
        places = self._places(tensors, config)
        self.modules = tuple(sorted(places.factors))
        self.saved = tuple(sorted(places.saved))
        self.passed["tensors"] = f"{len(tensors)} tensors of {len(self.modules) + len(self.saved)} modules"
        self._check_shapes(places, tensors, config)
        self._check_tie(places, tensors, config)
        self.passed["shapes"] = "those of the base model and of the configured ranks"
        largest = self._measure(places, tensors, config)
        self.passed["finite"] = "no NaN, no infinity"
        self._check_bounds(largest, config)
        norm = max(self.norms.values(), default=0.0)
        self.passed["bounds"] = f"largest norm of a delta {norm:.3g}"
        # Below this, float32 has lost the value. What a magnitude, or the loss of a part of the base, does is known
        # only where the base's weights are.
        replaces = places.saved or config.use_dora or config.init != "plain"
        shifts = any(largest[parts["bias"]] for parts in places.factors.values() if "bias" in parts)
        if not (replaces or shifts) and norm < np.finfo(np.float32).tiny:
            raise NoEffectError(self.source, "every delta is zero; it was not trained, or its lora_alpha is 0")
        self.passed["effect"] = "it changes the base model"
        return Admitted(config, digest, self.modules, size, norm, self.saved)

    def _check_size(self, size: int, config: AdapterConfig) -> None:
        """Before a byte is read: no file is larger than what it may hold could make it."""
        layout = self.layout
        paths = [*layout.linears, *(layout.embedding or ())[:1]]
        numbers = 0
        for path in paths:
            d_out, d_in = layout.factors(path) or (0, 0)
            # Beside the factors a magnitude or a bias.
            numbers += min(config.rank(path), self.limits.max_rank) * (d_out + d_in) + d_out
        for path, parameters in layout.parameters.items():
            whole = config.saves(path) or self._has_copy(path)
            numbers += sum(math.prod(shape) for name, shape in parameters.items() if whole or name == "bias")
        most = numbers * _WIDEST + self.limits.header_bytes
        if size > most:
            raise OutOfBoundsError(
                self.source, f"size of {WEIGHTS_FILE} (by its ranks, the base model and header_bytes)", size, most
            )

    def _has_copy(self, path: str) -> bool:
        """Whether PEFT may store the base's own weight of this module: it does so with the embedding and the head."""
        return path == self.layout.head or (self.layout.embedding is not None and path == self.layout.embedding[0])

    def _places(self, tensors: Mapping[str, _Tensor], config: AdapterConfig) -> _Places:
        """The keys of the tensors by the module that each belongs to, if none is strange and none is missing."""
        places = _Places()
        unmatched = []
        for key in sorted(tensors):
            if not self._placed(key, places, config):
                unmatched.append(key)
            elif tensors[key]["dtype"] not in _NUMPY:
                raise unsupported(self.source, f"dtype of {key}", tensors[key]["dtype"])
        for path in places.factors.keys() & places.saved.keys():
            own = places.saved[path]
            # The bias of a module with factors becomes a part of them.
            if own.keys() != {"bias"} or not own["bias"].endswith(BASE_PARTS):
                raise unsupported(self.source, "a module both saved and adapted", path)
        factors = places.factors
        unmatched += [key for path, key in places.copies.items() if key.endswith(BASE_PARTS) and path not in factors]
        self._refuse(unmatched, "tensors that match no module of the base model that they could change")
        self._refuse(
            [] if factors or places.saved else ["(none)"], "the file holds no LoRA tensors and no saved modules"
        )
        modules = sorted(factors)
        self._refuse(
            [m for m in modules if not factors[m].keys() >= {"A", "B"}], "modules with only one of lora_A and lora_B"
        )
        # PEFT would drop them without a word: which adapter was meant, the one of the tensors or of the configuration?
        self._refuse(
            [m for m in modules if not (config.selection.covers(m) or self._is_tied_target(m, config))],
            "modules with tensors that target_modules, exclude_modules and layers_to_transform leave out",
        )
        self._check_whole(places, config)
        return places

    def _placed(self, key: str, places: _Places, config: AdapterConfig) -> bool:
        """Put a tensor's key where it belongs; False where the base model has no place for it.

        Raises:
            UnsupportedFeatureError: it has one, but nothing there can be changed yet, or the configuration says nothing
                of it.
        """
        try:
            path, part = place_of(key)
        except ValueError:
            return False
        layout, parameters = self.layout, self.layout.parameters.get(path, {})
        if part in FACTOR_PARTS:
            self._check_factor(key, path, part, config)
            embedded = layout.embedding is not None and path == layout.embedding[0]
            if part.startswith("lora_embedding_") != embedded and part != "lora_magnitude_vector":
                return False
            if layout.factors(path) is None:
                return False
            places.factors.setdefault(path, {})[FACTOR_PARTS[part]] = key
            return True
        name = part.removeprefix("base_layer.")
        beside = part in BASE_PARTS
        trained = (config.saves(path) and not beside) or (name == "bias" and self._trains_bias(beside, config))
        if trained and path in layout.others:
            raise unsupported(self.source, "a saved module that is neither linear, norm nor input embedding", key)
        if name not in parameters or not (trained or self._has_copy(path)):
            return False
        if trained or name == "bias":
            places.saved.setdefault(path, {})[name] = key
            return True
        return places.copies.setdefault(path, key) == key

    def _check_factor(self, key: str, path: str, part: str, config: AdapterConfig) -> None:
        if part.startswith("lora_embedding_") and path in self.layout.others:
            raise unsupported(self.source, "LoRA on an embedding that is not the input's", key)
        if path.removesuffix(".base_layer") in self.layout.others:
            raise unsupported(self.source, "LoRA on a module that is neither linear nor the input embedding", key)
        if part == "lora_magnitude_vector" and not config.use_dora:
            raise unsupported(self.source, "a magnitude without use_dora", key)
        if part == "lora_B.bias" and not config.lora_bias:
            raise unsupported(self.source, "a bias of lora_B without lora_bias", key)

    def _trains_bias(self, beside: bool, config: AdapterConfig) -> bool:
        """Whether the configuration lets a bias change, of a module with factors or of another one."""
        return config.bias == "all" or (beside and config.bias == "lora_only")

    def _is_tied_target(self, module: str, config: AdapterConfig) -> bool:
        """Whether this is the head, which PEFT gives the embedding's factors too, without naming it."""
        tied = config.tying and self.layout.tied and self.layout.embedding is not None
        return tied and module == self.layout.head and config.selection.covers(self.layout.embedding[0])  # type: ignore[index]

    def _check_whole(self, places: _Places, config: AdapterConfig) -> None:
        """What the configuration announces is there."""
        for path, parts in places.factors.items():
            linear = path in self.layout.linears
            if config.lora_bias and not linear:
                raise unsupported(self.source, "lora_bias of an embedding", path)
            for part, wanted in (("magnitude", config.use_dora), ("bias", config.lora_bias)):
                if wanted and part not in parts:
                    feature = "use_dora" if part == "magnitude" else "lora_bias"
                    raise unsupported(self.source, f"{feature} without a {part} of every module", path)
            if config.init != "plain" and path == self.layout.head and self.layout.tied and path not in places.copies:
                feature = f"{config.init} of a head that is tied to the embedding, without the weight that it left"
                raise unsupported(self.source, feature, path)
            if config.init == "pissa" and linear and config.scale(path) <= 0:
                raise unsupported(self.source, "pissa with a scale of 0 or less", config.scale(path))
        for path in sorted(self.layout.others if config.modules_to_save else ()):
            if config.saves(path):
                raise unsupported(self.source, "a saved module that is neither linear, norm nor input embedding", path)
        missing = [
            f"{path}.{name}"
            for path, parameters in self.layout.parameters.items()
            for name in (parameters if config.saves(path) else ())
            if name not in places.saved.get(path, {})
        ]
        both = [path for path in places.factors if config.saves(path)]
        if both:
            raise unsupported(self.source, "a module both saved and adapted", both[0])
        self._refuse(missing, "parameters of modules_to_save that the file lacks")

    def _refuse(self, names: list[str], why: str) -> None:
        if names:
            raise UnmatchedTensorsError(self.source, [printable(name) for name in names], why)

    def _check_shapes(self, places: _Places, tensors: Mapping[str, _Tensor], config: AdapterConfig) -> None:
        for path in self.modules:
            rank = config.rank(path)
            if rank > self.limits.max_rank:
                raise OutOfBoundsError(self.source, f"rank of {path}", rank, self.limits.max_rank)
            d_out, d_in = self.layout.factors(path) or (0, 0)
            expected = {"A": [rank, d_in], "B": [d_out, rank], "bias": [d_out], "magnitude": [d_out]}
            known = f"rank {rank} by its configuration, {d_in} -> {d_out} in the base model"
            for part, key in places.factors[path].items():
                self._check_shape(path, key, tensors[key], expected[part], known)
        for path, parameters in (*places.saved.items(), *places.copied()):
            for name, key in parameters.items():
                known = "the base model's own"
                self._check_shape(path, key, tensors[key], list(self.layout.parameters[path][name]), known)

    def _check_shape(self, path: str, key: str, tensor: _Tensor, expected: list[int], known: str) -> None:
        found = list(tensor["shape"])
        if found == expected:
            return
        others = [size for size, own in zip(expected, found, strict=False) if size != own]
        if self._has_copy(path) and len(found) == len(expected) and others == [self._vocabulary]:
            feature = "a vocabulary of another size than the base model's (added tokens)"
            raise unsupported(self.source, feature, f"{path}: {found} instead of {expected}")
        raise ShapeMismatchError(self.source, f"{key} has shape {shown(found)}, expected {expected} ({known})")

    @property
    def _vocabulary(self) -> int:
        layout = self.layout
        return layout.embedding[1][0] if layout.embedding is not None else layout.linears[str(layout.head)][0]

    def _check_tie(self, places: _Places, tensors: Mapping[str, _Tensor], config: AdapterConfig) -> None:
        """ensure_weight_tying means one change of the one weight of embedding and head; the file holds it twice."""
        layout = self.layout
        if not (config.tying and layout.tied and layout.embedding is not None and layout.head is not None):
            return
        embedding, head = layout.embedding[0], layout.head
        if not {embedding, head} & (places.factors.keys() | places.saved.keys()):
            return
        table, output = places.factors.get(embedding, {}), places.factors.get(head, {})
        same = [(table.get("A"), output.get("B")), (table.get("B"), output.get("A"))]
        saved = [(places.weight_of(embedding), places.weight_of(head))]
        for transposed, pairs in ((True, same if table or output else []), (False, saved)):
            for one, other in pairs:
                if one == other is None:
                    continue
                if one is None or other is None or not _equal(tensors[one], tensors[other], transposed):
                    raise unsupported(self.source, "ensure_weight_tying of parts that are not the same", embedding)
        if table and config.scale(embedding) != config.scale(head):
            raise unsupported(self.source, "ensure_weight_tying of parts that are not the same", embedding)

    def _measure(self, places: _Places, tensors: dict[str, dict[str, Any]], config: AdapterConfig) -> dict[str, float]:
        """The largest absolute value of every tensor, by key, and the norms. Lets go of each one when done with it."""
        largest: dict[str, float] = {}

        def read(key: str) -> _Numbers:
            values = _numbers(tensors.pop(key))
            largest[key] = max(float(values.max()), -float(values.min()))
            if not math.isfinite(largest[key]):
                raise NonFiniteWeightsError(self.source, f"{key} holds NaN or infinity")
            return values

        for module in self.modules:
            parts = places.factors[module]
            self.norms[module] = delta_norm(read(parts["A"]), read(parts["B"]), config.scale(module))
        for key in sorted(tensors):
            read(key)
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


@dataclass(frozen=True, slots=True)
class _Places:
    """The keys of an adapter's tensors by the module that they belong to, and the part of it.

    ``factors`` has the parts "A", "B", "bias" and "magnitude"; ``saved`` the parameters that replace a module's own;
    ``copies`` the weights of the base that the adapter was trained on.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: dict[str, dict[str, str]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def copied(self) -> Iterable[tuple[str, dict[str, str]]]:
        return [(path, {"weight": key}) for path, key in self.copies.items()]

    def weight_of(self, path: str) -> str | None:
        """The key of the weight that stands in for the base's, if there is one."""
        return self.saved.get(path, {}).get("weight") or self.copies.get(path)


def _told(config: AdapterConfig) -> str:
    """The variant that a configuration names."""
    switched = {
        "rsLoRA": config.use_rslora,
        "DoRA": config.use_dora,
        "lora_bias": config.lora_bias,
        f"bias={config.bias}": config.bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        "PiSSA": config.init == "pissa",
        "OLoRA": config.init == "olora",
    }
    return ", ".join(name for name, on in switched.items() if on) or "plain LoRA"


def _equal(one: _Tensor, other: _Tensor, transposed: bool) -> bool:
    left, right = _numbers(one), _numbers(other)
    return bool(np.array_equal(left, right.T if transposed else right))


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


def _numbers(tensor: _Tensor) -> _Numbers:
    """A tensor's values in a dtype that numpy can multiply quickly: float64 stays, all others become float32."""
    values: Any = np.frombuffer(tensor["data"], dtype=_NUMPY[tensor["dtype"]]).reshape(tensor["shape"])
    if tensor["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    wide: _Numbers = values if tensor["dtype"] == "F64" else values.astype(np.float32, copy=False)
    return wide
