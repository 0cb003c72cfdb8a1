"""The differentiable forward pass of a gated mixture: each row's adapters, weighed at each token and module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_hub_sdk.composition.ramole import gate_scores, gate_weights
from lora_hub_sdk.engine.linear import Product, using
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.engine.base_model import BaseModel

#: a (width, d_in) and b (d_out, width) of each module's router.
Routers = Mapping[str, tuple[Tensor, Tensor]]
#: From a linear module's own product to what it computes in a pass.
Change = Callable[[Product], Product]


class FactorBank:
    """The factors of some adapters in memory, for each module rank by rank: rows of A, and columns of s B.

    The last row is zeros, for places without a rank.
    """

    def __init__(self, adapters: Sequence[AdapterFactors], base: BaseModel) -> None:
        self._ranks = [factors.rank for factors in adapters]
        self._starts = list(accumulate(self._ranks, initial=0))
        self.modules: dict[str, tuple[Tensor, Tensor]] = {}
        for path in dict.fromkeys(path for factors in adapters for path in factors.modules):
            d_out, d_in = base.shapes[path]
            a = torch.zeros(self._starts[-1] + 1, d_in, dtype=base.dtype, device=base.device)
            b = torch.zeros(self._starts[-1] + 1, d_out, dtype=base.dtype, device=base.device)
            for start, factors in zip(self._starts, adapters, strict=False):
                if found := factors.modules.get(path):
                    a[start : start + found.rank] = found.a.to(a)
                    b[start : start + found.rank] = (found.b.float() * found.scale).t().to(b)
            self.modules[path] = (a, b)
        self._device = base.device

    def members(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Places in the bank (b, k, r) of each row's adapters, given by number, and which there are (b, k)."""
        k = max(len(row) for row in rows)
        r = max(self._ranks[number] for row in rows for number in row)
        places = torch.full((len(rows), k, r), self._starts[-1])
        present = torch.zeros(len(rows), k, dtype=torch.bool)
        for at, row in enumerate(rows):
            for place, number in enumerate(row):
                start, rank = self._starts[number], self._ranks[number]
                places[at, place, :rank] = torch.arange(start, start + rank)
                present[at, place] = True
        return places.to(self._device), present.to(self._device)


@dataclass(frozen=True)
class GateBatch:
    """Rows padded on the right: ``ids`` and ``mask`` (b, l).

    ``at`` (n,) are the positions in the flat batch that predict an answer's tokens, ``targets`` (n,) these tokens, and
    ``shares`` (n,) what each counts: those of a row sum to 1. ``prompts`` (b,) are the prompts' lengths.
    """

    ids: Tensor
    mask: Tensor
    at: Tensor
    targets: Tensor
    shares: Tensor
    prompts: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, device: torch.device) -> GateBatch:
        """From each row's tokens of prompt and answer."""
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
        at: list[int] = []
        for number, (prompt, answer) in enumerate(rows):
            size = len(prompt) + len(answer)
            ids[number, :size] = torch.tensor([*prompt, *answer])
            mask[number, :size] = 1
            start = number * longest + len(prompt) - 1
            at += range(start, start + len(answer))
        return cls(
            ids.to(device),
            mask.to(device),
            torch.tensor(at, device=device),
            torch.tensor([token for _, answer in rows for token in answer], device=device),
            torch.tensor([1 / len(answer) for _, answer in rows for _ in answer], device=device),
            torch.tensor([len(prompt) for prompt, _ in rows], device=device),
        )


class AnswerPass:
    """Losses of answers in passes in which some linear modules compute otherwise.

    It takes over the forward of modules for a pass, as the engine does, and the model is as it came after it.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._head = next(
            (path for path, module in base.modules.items() if module is cast(Any, base.model).get_output_embeddings()),
            None,
        )

    def losses(
        self, batch: GateBatch, changes: Mapping[str, Change], products: Mapping[str, Product] | None = None
    ) -> Tensor:
        """Each row's mean of -log p over its answer's tokens, (b,), float32.

        Args:
            changes: by the paths of the modules.
            products: what modules compute by themselves, where not by their forward; these may have no gradient.
        """
        run: Any = self._base.model
        wanted = dict(changes)
        if self._head is not None:
            wanted.setdefault(self._head, lambda product: _some(product, batch.at))
        # Only in our turn is a module's forward its own.
        with self._base.turn:
            own = dict(products or {})
            own |= {path: change(own.get(path, self._base.modules[path].forward)) for path, change in wanted.items()}
            with using(self._base.modules, own):
                logits = run(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        chosen = logits.flatten(0, 1)
        if len(chosen) != len(batch.at):
            chosen = chosen[batch.at]
        each = nn.functional.cross_entropy(chosen.float(), batch.targets, reduction="none") * batch.shares
        return torch.zeros(len(batch.ids), device=each.device).index_add(0, batch.at // batch.ids.shape[1], each)


class GatedForward:
    """Losses of answers under mixtures of a bank's adapters; gradients reach the routers and nothing else."""

    def __init__(self, base: BaseModel, bank: FactorBank) -> None:
        self._bank, self._pass = bank, AnswerPass(base)

    def losses(
        self,
        batch: GateBatch,
        members: Sequence[Sequence[int]],
        routers: Routers | None,
        shares: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """Each row's mean of -log p over its answer's tokens, (b,), float32.

        Args:
            members: the numbers of each row's adapters, at least one.
            routers: None weighs a row's adapters by ``shares`` alone.
            shares: what each row's adapters weigh where scores are equal; None is alike.
        """
        places, present = self._bank.members(members)
        prior = torch.zeros(present.shape, device=present.device).masked_fill(~present, -torch.inf)
        for row, own in enumerate(shares or ()):
            prior[row, : len(own)] = torch.tensor(own).log()
        changes: dict[str, Change] = {}
        for path, factors in self._bank.modules.items():
            router = None if routers is None else routers.get(path)
            changes[path] = _gated(path, factors, router, places, prior, batch.ids.shape[1])
        return self._pass.losses(batch, changes)


def _gated(
    path: str,
    factors: tuple[Tensor, Tensor],
    router: tuple[Tensor, Tensor] | None,
    places: Tensor,
    prior: Tensor,
    tokens: int,
) -> Change:
    rows, k, r = places.shape
    a, b = (table[places.view(-1)].view(rows, k * r, -1) for table in factors)

    def added(x: Tensor) -> Tensor:
        hidden = (x @ a.transpose(1, 2)).view(rows, tokens, k, r)
        if router is None:
            weights = gate_weights(prior[:, None].expand(rows, tokens, k), 1)
        else:
            gate_a, gate_b = (part.to(a.dtype) for part in router)
            keys = (b @ gate_b).view(rows, k, r, -1)
            scores = gate_scores(hidden, x @ gate_a.t(), keys)
            weights = gate_weights(scores + prior[:, None] * len(gate_a) ** 0.5, len(gate_a))
        return (hidden * weights.to(hidden.dtype)[..., None]).view(rows, tokens, k * r) @ b

    return by_rows(path, (rows, tokens), a.dtype, added)


def by_rows(path: str, shape: tuple[int, int], dtype: torch.dtype, added: Product) -> Change:
    """Adds to a module's product what ``added`` makes of its inputs (b, l, d_in) in a dtype.

    Args:
        path: of the module, for the error.
        shape: b and l.
    """

    def change(product: Product) -> Product:
        def forward(x: Tensor) -> Tensor:
            output = product(x)
            rows = x if x.dim() == 3 else x.reshape(-1, shape[1], x.shape[-1])
            if rows.shape[:2] != shape:
                raise ConfigurationError(f"{path!r} is given some tokens only, as in a routed expert: no gate fits it")
            return output + added(rows.to(dtype)).view(output.shape).to(output.dtype)

        return forward

    return change


def _some(product: Product, at: Tensor) -> Product:
    """The head's product at the answers' positions alone: over all, it can be most of a small model's work."""
    return lambda hidden: product(hidden.flatten(0, 1)[at])[None]
