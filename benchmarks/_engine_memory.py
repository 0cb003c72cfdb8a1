"""Part "memory": what composing takes beside the base model's own passes, here and in the paper's einsum."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Final

from benchmarks._report import Asked, Report, machine, spread
from benchmarks._systems import EinsumSystem, EngineSystem, GenerateSystem, System
from benchmarks._workload import Model, Sizes, build_workload
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.types import Adapter

#: Peak of ours / peak of the einsum, both without the adapters' own factors, which either has to hold.
ASKED: Final = Asked(0.1, most=True)
#: Later steps change nothing but the cache.
_TOKENS: Final = 4


def measure_memory(model: Model, adapters: Sequence[Adapter], sizes: Sizes) -> Report:
    """The mixture of every row's own adapters, ours and the einsum's; bytes, once, as they do not vary.

    ``peak_bytes`` of a system is what its passes take at any moment beyond those of the model without adapters in the
    same loop. The adapters' own factors lie in place before, and are ``adapters_bytes``.
    """
    workload = build_workload(adapters, sizes, model.vocabulary)
    with closing(Engine(base := model.load())) as engine:
        bare = EngineSystem("base", engine, workload, workload.base)
        mixture = EngineSystem("mixture", engine, workload, workload.mixture)
        own = _composing(base, mixture, bare)
        held = engine.stats().device.held_bytes
    plain = model.load()
    einsum = EinsumSystem("einsum", plain, workload, workload.mixture)
    other = _composing(plain, einsum, GenerateSystem("transformers", plain, plain.model, workload))
    ratio = own / other
    return Report(
        machine=machine(),
        settings={"part": "memory", "base_model": model.id, "dtype": model.dtype, **asdict(sizes)},
        systems={
            "mixture": {"peak_bytes": own, "adapters_bytes": held},
            "einsum": {"peak_bytes": other, "adapters_bytes": einsum.size_bytes},
        },
        ratios={"mixture / einsum, peak bytes": ASKED.of(spread([ratio]))},
    )


def _composing(base: BaseModel, system: System, bare: System) -> int:
    from benchmarks._live_bytes import live_bytes

    for each in (bare, system):  # whatever is made once and kept is no part of composing
        each.run(_TOKENS)
    own, without = (live_bytes(base, lambda of=of: of.run(_TOKENS)) for of in (system, bare))  # type: ignore[misc]
    return max(more - less for more, less in zip(own, without, strict=True))
