"""The differentiable forward pass of one set of experts that all rows share, weighed by gates or by fixed numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lora_hub_sdk.composition.expert_gate import GateRule, expert_weights
from lora_hub_sdk.engine._gate_forward import AnswerPass, Change, GateBatch, by_rows
from lora_hub_sdk.engine.linear import Product
from lora_hub_sdk.types import Averaged

if TYPE_CHECKING:
    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.engine.base_model import BaseModel


@dataclass(frozen=True)
class _Ranks:
    """All experts' ranks at one module: ``a`` (R, d_in), and ``b`` (R, d_out), the columns of s B.

    ``owners`` (n, R) has a one where a rank is an expert's, ``depths`` (r, R) where it is that expert's first, second
    and so on: as one-hot matrices, by which a product is quicker than a lookup, forward and backward.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    depths: Tensor


class ExpertForward:
    """Losses of answers under one set of experts; gradients reach the directions and nothing else.

    Args:
        experts: fitted to the base, plain LoRAs of linear modules.
    """

    def __init__(self, base: BaseModel, experts: Sequence[AdapterFactors]) -> None:
        self._base, self._count, self._pass = base, len(experts), AnswerPass(base)
        paths = dict.fromkeys(path for factors in experts for path in factors.modules)
        self._modules = {path: _ranks(path, experts, base) for path in paths}

    @property
    def inputs(self) -> dict[str, int]:
        """d_in of each module that an expert adapts, by path."""
        return {path: ranks.a.shape[1] for path, ranks in self._modules.items()}

    def losses(
        self,
        batch: GateBatch,
        directions: Mapping[str, Tensor],
        rule: GateRule,
        noise: torch.Generator | None = None,
    ) -> Tensor:
        """Each row's mean of -log p over its answer's tokens, (b,), float32; differentiable in the directions.

        Args:
            directions: by module path (n, d_in), float32 on the base's device; all weigh alike in a module without.
            noise: of a CPU. Where the rule is sparse, Gumbel(0, 1) noise from it is added to each score. The chosen
                experts' weights count forward, and the gradient is that of the softmax over all, straight through
                (arXiv 1611.01144): so those that were not chosen learn too.
        """
        shape = (len(batch.ids), batch.ids.shape[1])
        span = None
        if rule.per == "prompt":
            within = torch.arange(shape[1], device=batch.ids.device) < batch.prompts[:, None]
            span = (within / batch.prompts[:, None])[:, None]
        changes: dict[str, Change] = {}
        for path, ranks in self._modules.items():
            weigh = _weigher(directions.get(path), self._count, rule, noise)
            added = _by_tokens(ranks, weigh) if span is None else _by_prompts(ranks, weigh, span)
            changes[path] = by_rows(path, shape, ranks.a.dtype, added)
        return self._pass.losses(batch, changes)

    def fixed_losses(self, batch: GateBatch, weights: Sequence[float], averaged: Averaged) -> Tensor:
        """As ``losses`` with the same weights for all rows and modules; without gradient, and quicker.

        Args:
            weights: any numbers, one for each expert.
            averaged: "outputs" or "parameters" (paper section 4.2; eq. 4 with cross terms).
        """
        with torch.no_grad():
            held = torch.tensor(list(weights), dtype=torch.float32, device=self._base.device)
            changes = {
                path: change
                for path, ranks in self._modules.items()
                if (change := _fixed(ranks, held, averaged == "parameters")) is not None
            }
            return self._pass.losses(batch, changes, self._base.products)


def _ranks(path: str, experts: Sequence[AdapterFactors], base: BaseModel) -> _Ranks:
    found = [(number, one) for number, factors in enumerate(experts) if (one := factors.modules.get(path))]
    owners = [number for number, one in found for _ in range(one.rank)]
    depths = [depth for _, one in found for depth in range(one.rank)]

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(base.device, base.dtype).contiguous()

    return _Ranks(
        placed(torch.cat([one.a for _, one in found])),
        placed(torch.cat([(one.b.float() * one.scale).t() for _, one in found])),
        placed(one_hot(torch.tensor(owners), len(experts)).t()),
        placed(one_hot(torch.tensor(depths)).t()),
    )


#: From a module's inputs (..., d_in) to weights (..., n), float32.
_Weigher = Callable[[Tensor], Tensor]


def _weigher(directions: Tensor | None, count: int, rule: GateRule, noise: torch.Generator | None) -> _Weigher:
    def weigh(x: Tensor) -> Tensor:
        nothing = x.new_zeros(*x.shape[:-1], count, dtype=torch.float32)
        scores = nothing if directions is None else _scores(x, directions)
        if noise is None or rule.top_k is None or rule.top_k >= count:
            return expert_weights(scores, rule)
        noisy = scores + _gumbel(scores, noise)
        soft = expert_weights(noisy, replace(rule, top_k=None))
        return expert_weights(noisy.detach(), rule) + (soft - soft.detach())

    return weigh


def _gumbel(scores: Tensor, noise: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that every device sees the same.
    drawn = torch.empty(scores.shape).exponential_(generator=noise)
    return -drawn.clamp_min_(torch.finfo(drawn.dtype).tiny).log_().to(scores.device)


def _by_tokens(ranks: _Ranks, weigh: _Weigher) -> Product:
    def added(x: Tensor) -> Tensor:
        weights = weigh(x).to(x.dtype) @ ranks.owners
        return ((x @ ranks.a.t()) * weights) @ ranks.b

    return added


def _by_prompts(ranks: _Ranks, weigh: _Weigher, span: Tensor) -> Product:
    """(sum of w_i s_i B_i)(sum of w_j A_j) x without these sums: what ranks of one depth say is added up in between."""

    def added(x: Tensor) -> Tensor:
        mean = (span @ x.float())[:, 0]
        weights = (weigh(mean).to(x.dtype) @ ranks.owners)[:, None]
        fused = ((x @ ranks.a.t()) * weights) @ ranks.depths.t()
        return ((fused @ ranks.depths) * weights) @ ranks.b

    return added


def _fixed(ranks: _Ranks, weights: Tensor, fused: bool) -> Change | None:
    """None where nobody has a weight."""
    each = weights @ ranks.owners.float()
    if not each.any():
        return None
    a, b = ranks.a, ranks.b.float() * each[:, None]
    if fused:
        depths = ranks.depths.float()
        a, b = (depths @ (a.float() * each[:, None])).to(a.dtype), depths @ b
    else:
        a, b = a[each != 0], b[each != 0]
    a, b = a.t().contiguous(), b.to(a.dtype)
    return lambda product: lambda x: (output := product(x)) + ((x.to(a.dtype) @ a) @ b).to(output.dtype)


class _Scores(torch.autograd.Function):
    """<x, e_i> in float32, which keeps x for the backward pass in its own dtype: it is the same at several modules."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, directions: Tensor) -> Tensor:
        ctx.save_for_backward(x, directions)
        return x.float() @ directions.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, directions = ctx.saved_tensors
        gradient = gradients[0]
        to_x = (gradient @ directions).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_directions = None
        if ctx.needs_input_grad[1]:
            to_directions = gradient.flatten(0, -2).t() @ x.flatten(0, -2).float()
        return to_x, to_directions


def _scores(x: Tensor, directions: Tensor) -> Tensor:
    found: Tensor = _Scores.apply(x, directions)  # type: ignore[no-untyped-call]
    return found
