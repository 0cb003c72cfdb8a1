"""A route as one standard PEFT adapter, which PEFT, vLLM or LoRAX serve without this package."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from uuid import uuid4

from lora_hub_sdk.composition.combining import check_combining
from lora_hub_sdk.composition.export_card import export_card
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.merging import MergedModule, merge
from lora_hub_sdk.composition.strategies import get_strategy
from lora_hub_sdk.errors import ConfigurationError, UnsupportedRouteError
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
from lora_hub_sdk.registry.admission import WEIGHTS_FILE, content_digest
from lora_hub_sdk.registry.layout import BaseLayout
from lora_hub_sdk.types import GATED, Adapter, Member, Route

if TYPE_CHECKING:
    from torch import Tensor

#: What the numbers can be saved in; float32 rounds to less than one part in ten million.
DTYPES: Final = ("float32", "bfloat16", "float16")
_CARD: Final = "README.md"


class Content(Protocol):
    """An adapter's files as they were read, and proven to be the registered ones."""

    @property
    def factors(self) -> AdapterFactors: ...
    @property
    def config(self) -> bytes: ...
    @property
    def weights(self) -> bytes | mmap: ...


class Base(Protocol):
    """What an export may need of the loaded base model."""

    def fit(self, factors: AdapterFactors) -> AdapterFactors:
        """As ``engine.fitting.Fitting.fit``."""
        ...

    def weight(self, path: str) -> Tensor:
        """W of a linear module or an embedding, (d_out, d_in), on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """The adapter that was written.

    ``rank`` is that of its modules, ``exact_rank`` the one from which on only rounding is lost. Errors are Frobenius
    norms of what the saved deltas lack, as shares of the route's: ``relative_error`` of all modules together,
    ``errors`` of each, by path. ``digest`` is what it would be registered with, ``size_bytes`` that of its weights.
    """

    path: Path
    rank: int
    exact_rank: int
    relative_error: float
    errors: Mapping[str, float]
    size_bytes: int
    digest: str

    @property
    def largest_error(self) -> float:
        """The error of the module that has the largest."""
        return max(self.errors.values(), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, the largest error with it."""
        return {**asdict(self), "path": str(self.path), "largest_error": self.largest_error}


def export_route(
    route: Route,
    path: str | os.PathLike[str],
    *,
    layout: Callable[[str], BaseLayout],
    read: Callable[[Adapter], Content],
    base: Callable[[str], Base],
    rank: int | None = None,
    dtype: str | None = None,
) -> Exported:
    """Write what a route's adapters do together as one adapter; see ``LoraHub.export``.

    All modules get one rank, r = alpha, padded with zeros, and a module that some layers have is written for all
    layers: LoRAX and older versions of vLLM know no patterns, and LoRAX drops a module that any layer lacks.

    Args:
        layout: of a base model, by its canonical name.
        read: reads an adapter's files and proves them to be what was registered.
        base: a base model itself, asked for only where an adapter has to be fitted to it.

    Raises:
        UnsupportedRouteError: no LoRA does what this route does; it names why.
        ConfigurationError: a rank or dtype that cannot be, or a path that is taken or cannot be written.
        AdapterChangedError: by ``read``.
    """
    import torch

    members = _members(route)
    _check_options(rank, dtype)
    target = _free(path)
    contents = {member.adapter.digest: read(member.adapter) for member in members}
    first = members[0]
    base_model = first.adapter.base_model
    alone = contents[first.adapter.digest] if rank is None and len(members) == 1 and first.weight == 1.0 else None
    if alone is not None and _has_gains(alone.factors):
        return _copy(route, first, alone, target, dtype)
    loaded = cache(partial(base, base_model))
    parts = [(member, _fitted(contents[member.adapter.digest].factors, loaded)) for member in members]
    if alone is not None and parts[0][1].saved:
        return _copy(route, first, alone, target, dtype)
    check_combining(route, {factors.digest: factors for _, factors in parts})
    for member, factors in parts:
        _require_lora(member, factors, cut=rank is not None)

    def merged_at(module: str) -> MergedModule:
        return merge(
            [(member.weight, factors.modules[module]) for member, factors in parts if module in factors.modules],
            fused=route.averaged == "parameters",
            rank=rank,
            dtype=getattr(torch, dtype or "float32"),
            base_weight=lambda: loaded().weight(module),
        )

    merged = {module: merged_at(module) for module in sorted({path for _, one in parts for path in one.modules})}
    saved = _Saved.of(merged, layout(base_model), route)
    norm = math.hypot(*(one.norm for one in merged.values()))
    lost = math.hypot(*(one.lost for one in merged.values()))
    return _write(
        target,
        route,
        members,
        saved.config(base_model),
        saved.tensors,
        rank=saved.rank,
        exact_rank=max(one.exact_rank for one in merged.values()),
        relative_error=lost / norm if norm else 0.0,
        errors={module: one.error for module, one in merged.items()},
    )


def weighed_route(weights: Mapping[str, float], find: Callable[[str], Adapter], strategy: str) -> Route:
    """The route of named adapters with these weights.

    Raises:
        UnknownStrategyError: of that name.
        As ``find``.
    """
    chosen = get_strategy(strategy)
    members = tuple(Member(find(name), weight) for name, weight in weights.items())
    return Route(chosen.name, chosen.averaged, members)


# -- what can be saved ------------------------------------------------------------------------------------------------


def _members(route: Route) -> list[Member]:
    """The adapters that take part, the same content once."""
    if route.averaged in GATED:
        raise UnsupportedRouteError(
            f"a route of strategy {route.strategy!r} cannot be saved as one adapter: its weights differ from token to "
            "token, or from prompt to prompt; route with mixture or fusion"
        )
    found: dict[str, Member] = {}
    for member in route.members:
        known = found.get(member.adapter.digest)
        found[member.adapter.digest] = Member(member.adapter, member.weight + (known.weight if known else 0.0))
    members = [member for member in found.values() if member.weight != 0.0]
    if not members:
        raise UnsupportedRouteError("this route is answered by the base model alone, so there is nothing to save")
    if not all(math.isfinite(member.weight) for member in members):
        raise ConfigurationError(f"weights of a route must be finite, found {[member.weight for member in members]}")
    bases = sorted({member.adapter.base_model for member in members})
    if len(bases) > 1:
        raise ConfigurationError(f"the route's adapters are for several base models: {', '.join(bases)}")
    return members


def _check_options(rank: int | None, dtype: str | None) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigurationError(f"rank={rank!r}: expected a whole number of 1 or more, or None for an exact export")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigurationError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")


def _has_gains(factors: AdapterFactors) -> bool:
    return any(one.magnitude is not None or one.gain is not None for one in factors.modules.values())


def _fitted(factors: AdapterFactors, base: Callable[[], Base]) -> AdapterFactors:
    """What is saved beside the factors may be the base's own, which only the base can tell."""
    plain = factors.init == "plain" and not factors.saved and not _has_gains(factors)
    return factors if plain else base().fit(factors)


def _require_lora(member: Member, factors: AdapterFactors, *, cut: bool) -> None:
    """Refuse what low-rank factors cannot hold; a gain can be approximated where a rank was asked for."""
    name, alone = repr(member.adapter.name), "such an adapter can be exported alone, with weight 1 and no rank"
    if factors.saved:
        raise UnsupportedRouteError(
            f"adapter {name} replaces whole modules (modules_to_save: {', '.join(sorted(factors.saved)[:5])}), which "
            f"no LoRA can; {alone}"
        )
    if not cut and _has_gains(factors):
        raise UnsupportedRouteError(
            f"adapter {name} is DoRA, and a mixture with it is no LoRA; give a rank to get the nearest LoRA, with its "
            f"error; {alone}"
        )


# -- how it is saved --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved:
    """The tensors by PEFT's names, and the numbers of the configuration that they need."""

    tensors: Mapping[str, Tensor]
    rank: int
    targets: Sequence[str]
    biased: bool

    @classmethod
    def of(cls, merged: Mapping[str, MergedModule], layout: BaseLayout, route: Route) -> _Saved:
        from torch.nn.functional import pad

        table = None if layout.embedding is None else layout.embedding[0]
        biased = any(one.shift is not None for one in merged.values())
        if biased and table in merged:
            raise UnsupportedRouteError(
                f"this route of strategy {route.strategy!r} adapts the embedding and has biases (lora_bias); PEFT can "
                "save either, and not both in one adapter"
            )
        if not any(one.norm > 0.0 or one.shift is not None for one in merged.values()):
            raise UnsupportedRouteError("the route's weights cancel its adapters out, so there is nothing to save")
        rank = max(1, *(one.a.shape[0] for one in merged.values()))
        some = next(iter(merged.values()))
        tensors: dict[str, Tensor] = {}
        for path in _completed(merged, layout):
            one = merged.get(path)
            d_out, d_in = layout.factors(path) or (0, 0)
            a, b = some.a.new_zeros(rank, d_in), some.b.new_zeros(d_out, rank)
            if one is not None:
                a, b = pad(one.a, (0, 0, 0, rank - one.a.shape[0])), pad(one.b, (0, rank - one.b.shape[1]))
            a_key, b_key = (
                ("lora_embedding_A", "lora_embedding_B") if path == table else ("lora_A.weight", "lora_B.weight")
            )
            tensors[f"base_model.model.{path}.{a_key}"] = a
            tensors[f"base_model.model.{path}.{b_key}"] = b
            if biased:
                shift = None if one is None else one.shift
                tensors[f"base_model.model.{path}.lora_B.bias"] = a.new_zeros(d_out) if shift is None else shift
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise ConfigurationError(f"{key} has numbers beyond {tensor.dtype}; export with dtype='float32'")
        return cls(tensors, rank, _targets(_completed(merged, layout), layout), biased)

    def config(self, base_model: str) -> bytes:
        """The fields that every reader of such a file knows; what is left out is PEFT's default."""
        fields = {
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "revision": None,
            "target_modules": list(self.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }
        if self.biased:  # PEFT before 0.14 stops at a field that it does not know
            fields["lora_bias"] = True
        return json.dumps(fields, indent=2, sort_keys=True).encode()


def _completed(merged: Mapping[str, object], layout: BaseLayout) -> list[str]:
    """The modules, and those that differ from one of them in the layer's number alone."""
    kinds = {_kind(path) for path in merged}
    return sorted({*merged, *(path for path in layout.linears if _kind(path) in kinds)})


def _kind(path: str) -> str:
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join([*parts[: numbers[0]], "*", *parts[numbers[0] + 1 :]]) if numbers else path


def _targets(paths: Sequence[str], layout: BaseLayout) -> list[str]:
    """Short names, as trainers write them, where PEFT finds exactly these modules by them; else whole paths."""
    strangers = {*layout.linears, *layout.parameters, *layout.others}.difference(paths)
    taken = {_last(path) for path in strangers}
    return sorted({path if _last(path) in taken or _last(path).isdecimal() else _last(path) for path in paths})


def _last(path: str) -> str:
    return path.rpartition(".")[2]


# -- files ------------------------------------------------------------------------------------------------------------


def _copy(route: Route, member: Member, content: Content, target: Path, dtype: str | None) -> Exported:
    """An adapter that is no LoRA, alone: its own files, as they are."""
    if dtype is not None:
        raise ConfigurationError(
            f"dtype={dtype!r}: adapter {member.adapter.name!r} is DoRA or replaces whole modules, and can only be "
            "copied as it is; leave dtype out"
        )
    modules = dict.fromkeys([*content.factors.modules, *content.factors.saved], 0.0)
    ranks = member.adapter.rank
    return _write(
        target,
        route,
        [member],
        content.config,
        content.weights,
        rank=ranks,
        exact_rank=ranks,
        relative_error=0.0,
        errors=modules,
    )


def _write(
    target: Path,
    route: Route,
    members: Sequence[Member],
    config: bytes,
    weights: bytes | mmap | Mapping[str, Tensor],
    *,
    rank: int,
    exact_rank: int,
    relative_error: float,
    errors: Mapping[str, float],
) -> Exported:
    from safetensors.torch import save_file

    with _new_folder(target) as folder:
        file = folder / WEIGHTS_FILE
        if isinstance(weights, Mapping):
            save_file(dict(weights), file, metadata={"format": "pt"})
        else:
            file.write_bytes(weights)
        (folder / CONFIG_FILE).write_bytes(config)
        with file.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            digest = content_digest(config, cast(bytes, content))
        exported = Exported(target, rank, exact_rank, relative_error, errors, file.stat().st_size, digest)
        card = export_card(target.name, route, members, exported)
        (folder / _CARD).write_text(card, "utf-8")
    return exported


def _free(path: str | os.PathLike[str]) -> Path:
    target = Path(path).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigurationError(f"path {str(target)!r} holds something already; choose a new folder")
    return target


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside, which becomes the target as a whole, or is removed."""
    work = target.with_name(f".{target.name}-{uuid4().hex[:8]}")
    try:
        work.mkdir(parents=True)
        yield work
        for file in work.iterdir():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
        if os.name == "nt" and target.exists():  # only there a rename does not replace an empty folder
            target.rmdir()
        work.rename(target)
    except OSError as error:
        raise ConfigurationError(f"path {str(target)!r} cannot be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
