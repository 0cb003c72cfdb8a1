"""Part "forms": what each form of the LoRA product adds to the linear layers of one pass; see ``engine.forms``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from statistics import median
from typing import TYPE_CHECKING, Final

from benchmarks._report import Report, machine
from benchmarks._rounds import in_turns, timed
from benchmarks._workload import Model, Sizes, mixture_of
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.batch_lora import BatchLora, RowLora
from lora_hub_sdk.engine.forms import Form
from lora_hub_sdk.engine.lora_layers import LoraLayers
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.types import Adapter

if TYPE_CHECKING:
    from torch import Tensor

#: Of steps, which take milliseconds; prompts take much longer, and ``sizes.rounds``.
_ROUNDS: Final = 21
_PLAIN: Final = "no adapters"


def measure_forms(model: Model, adapters: Sequence[Adapter], sizes: Sizes) -> Report:
    """A pass through the layers that have adapters, with each form that can serve it, less the same pass without them.

    Rows draw their routes from all adapters, from 8, or have one in common. ``first_ms`` is a batch's first pass.
    """
    import torch

    base = model.load()
    pool = RankPool.of(base, 1 << 40)
    layers = LoraLayers(base.modules, base.products, pool)
    systems: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for pooled, tokens in product((len(adapters), 8, sizes.k), (1, sizes.prompt_tokens)):
            rows = _rows(pool, adapters[:pooled], sizes)
            inputs = _inputs(base, pool, sizes.batch, tokens)
            bare = [RowLora(terms_of(mixture_of([]), {}), ())] * sizes.batch
            calls: dict[str, Callable[[], object]] = {
                _PLAIN: partial(_through, base, layers, _Forced(bare, base, "shared"), inputs)
            }
            first: dict[str, float] = {}
            for form in _forms(one_route=pooled == sizes.k, tokens=tokens):
                calls[form] = partial(_through, base, layers, _Forced(rows, base, form), inputs)
                first[form] = timed(calls[form])
            seconds = in_turns(calls, _ROUNDS if tokens == 1 else sizes.rounds)
            plain = median(seconds.pop(_PLAIN))
            ranks = len({rank for row in rows for rank in row.ranks})
            for name, taken in seconds.items():
                systems[f"{name}, {tokens} tokens a row, {ranks} ranks"] = {
                    "median_ms": 1000 * (median(taken) - plain),
                    "first_ms": 1000 * (first[name] - plain),
                    "without_ms": 1000 * plain,
                }
    return Report(
        machine=machine(),
        settings={"part": "forms", "base_model": model.id, "dtype": model.dtype, **asdict(sizes)},
        systems=systems,
        ratios={},
    )


def _forms(*, one_route: bool, tokens: int) -> tuple[Form, ...]:
    """Those that can serve such a pass."""
    several: tuple[Form, ...] = ("lookup", "dense", "gather") if tokens == 1 else ("gather",)
    return ("shared", *several) if one_route else several


class _Forced(BatchLora):
    """Rows whose form is given, whatever would be chosen."""

    def __init__(self, rows: Sequence[RowLora], base: BaseModel, form: Form) -> None:
        super().__init__(rows, device=base.device, dtype=base.dtype)
        self._given = form

    def form(self, tokens: int) -> Form:
        return self._given


def _rows(pool: RankPool, adapters: Sequence[Adapter], sizes: Sizes) -> list[RowLora]:
    draw, found = random.Random(0), []
    for _ in range(sizes.batch):
        chosen = adapters if len(adapters) == sizes.k else draw.sample(adapters, sizes.k)
        terms = terms_of(mixture_of(chosen), {one.digest: one.rank for one in chosen})
        by_digest = {one.digest: one for one in chosen}
        ranks = [rank for digest in terms.digests for rank in pool.pin(load_factors(by_digest[digest]))]
        found.append(RowLora(terms, tuple(ranks)))
    return found


def _inputs(base: BaseModel, pool: RankPool, rows: int, tokens: int) -> dict[str, Tensor]:
    """For each linear layer of the pool an input; those that share one in the model do so here."""
    import torch

    found = {}
    for group in (group for group in base.groups if group[0] in pool.members):
        x = torch.randn(rows, tokens, base.shapes[group[0]][1], device=base.device, dtype=base.dtype)
        found.update(dict.fromkeys(group, x))
    return found


def _through(base: BaseModel, layers: LoraLayers, batch: BatchLora, inputs: dict[str, Tensor]) -> None:
    tokens = next(iter(inputs.values())).shape[1]
    with layers.apply(batch, tokens):
        for path, x in inputs.items():
            base.modules[path](x)
    if base.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
