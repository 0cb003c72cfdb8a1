"""The activations of a batch with gates, each times its weight at that row, token and module (see ``gates``).

Members score by their outputs (``TokenGate``) or by what goes into the module (``ExpertGate``). Weights that hold for a
whole prompt are found when it is read and kept with the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_hub_sdk.composition.expert_gate import ExpertGate

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.composition.gates import TokenGate
    from lora_hub_sdk.engine.batch_lora import BatchLora
    from lora_hub_sdk.engine.forms import Form
    from lora_hub_sdk.engine.gate_places import Gating
    from lora_hub_sdk.engine.rank_pool import Table

_ABSENT = float("-inf")


def weigh_looked_up(hidden: Tensor, x: Tensor, table: Table, batch: BatchLora) -> Tensor:
    """One token a row, the ranks of all rows one after the other. ``hidden`` (n, S), x (b, 1, d_in) -> (n, S)."""
    members, places = len(hidden), batch.places("lookup")
    weights = places.shares.repeat(members, 1)
    for gating in places.gatings:
        gate, own, at = batch.gates[gating.gate], x[gating.rows], gating.at
        if isinstance(gate, ExpertGate):
            found = _of_experts(gate, own, table, batch, gating)
        else:
            scores = hidden.new_zeros(members, gating.present.numel())
            if gating.gate in table.gates:
                keys = table.gates[gating.gate].keys[places.ranks[at]].transpose(0, 1)
                queries = _queries(own, table, gating)[:, 0, :, :].transpose(0, 1)
                asked = queries[:, gating.slot // gating.present.shape[1]]
                scores.index_add_(1, gating.slot, (keys * asked).sum(-1) * hidden[:, at])
            found = _of_scores(gate, scores.view(members, len(own), 1, -1).permute(1, 2, 0, 3), gating).to(x.dtype)
        weights[:, at] = found[:, 0].transpose(0, 1).reshape(members, -1)[:, gating.slot]
    mixed = hidden * weights
    if places.fused is not None:
        at, level = places.fused.at, places.fused.level
        levels = hidden.new_zeros(members, places.fused.count).index_add_(1, level, mixed[:, at])
        mixed[:, at] = levels[:, level] * weights[:, at]
    return mixed


def weigh_side_by_side(hidden: Tensor, x: Tensor | None, table: Table, batch: BatchLora, form: Form) -> Tensor:
    """W places for the ranks of each row. ``hidden`` (b, l, n, W), x (b, l, d_in) -> (b, l, n, W).

    x is None where the input is no vector, as an embedding's: there a row's members weigh alike.
    """
    from torch.nn.functional import pad

    places = batch.places(form)
    weights = places.shares[:, None, None].expand(hidden.shape)
    for gating in places.gatings:
        gate, slot, alone = batch.gates[gating.gate], gating.slot[:, None, None], len(gating.places) == len(hidden)
        own, mine = (x, hidden) if alone else (None if x is None else x[gating.rows], hidden[gating.rows])
        if isinstance(gate, ExpertGate):
            found = _of_experts(gate, own, table, batch, gating)
        else:
            # The last one is for places that are nobody's.
            scores = mine.new_zeros(*mine.shape[:3], gating.present.shape[1] + 1)
            if own is not None and gating.gate in table.gates:
                products = _products(own, table, places.ranks, gating)
                scores.scatter_add_(3, slot.expand(mine.shape), products * mine)
            found = _of_scores(gate, scores[..., :-1], gating).to(hidden.dtype)
        found = pad(found, (0, 1))  # again for nobody
        found = found.gather(3, slot.expand(*found.shape[:3], -1)).expand(mine.shape)
        weights = found if alone else weights.index_copy(0, gating.rows, found)
    mixed = hidden * weights
    if places.fused is not None:
        at = places.fused.at
        mine, level = mixed[at], places.fused.level[:, None, None].expand(-1, *hidden.shape[1:])
        levels = mine.new_zeros(*mine.shape[:3], places.fused.count).scatter_add_(3, level, mine)
        mixed[at] = levels.gather(3, level) * weights[at]
    return mixed


def _queries(x: Tensor, table: Table, gating: Gating) -> Tensor:
    """(m, l, n, width)"""
    from torch.nn.functional import linear

    return linear(x, table.gates[gating.gate].queries).view(*x.shape[:2], len(table.paths), -1)


def _products(x: Tensor, table: Table, ranks: Tensor, gating: Gating) -> Tensor:
    """Of queries and the keys of ``ranks``, (m, l, n, W)."""
    import torch

    keys = table.gates[gating.gate].keys
    if ranks.dim() == 1:
        return torch.einsum("blnw,rnw->blnr", _queries(x, table, gating), keys[ranks])
    return torch.einsum("blnw,brnw->blnr", _queries(x, table, gating), keys[ranks[gating.rows]])


def _of_scores(gate: TokenGate | ExpertGate, scores: Tensor, gating: Gating) -> Tensor:
    """Weights (m, l, n, k) from scores of that shape, float32."""
    return gate.weights(scores.float().masked_fill(~gating.present[:, None, None], _ABSENT))


def _of_experts(gate: ExpertGate, x: Tensor | None, table: Table, batch: BatchLora, gating: Gating) -> Tensor:
    """Weights (m, l, n, k) of x (m, l, d_in); l is 1 where they hold for all tokens."""
    if gate.rule.per == "token":
        return _by_input(gate, x, table, batch, gating)

    def find() -> Tensor:
        assert batch.prompt is not None, "only then they are looked for"
        mean = None if x is None else _means(x, batch.prompt[gating.rows])
        return _by_input(gate, mean, table, batch, gating)[:, 0]

    return batch.kept(gating, table.paths, find)[:, None]


def _by_input(gate: ExpertGate, x: Tensor | None, table: Table, batch: BatchLora, gating: Gating) -> Tensor:
    """As ``_of_experts``, for each of these x."""
    from torch.nn.functional import linear

    found = table.experts.get(gating.gate)
    present = gating.present[:, None, None]
    alike = present / present.sum(-1, keepdim=True).clamp(min=1)
    if x is None or found is None or gating.experts is None:
        return alike.expand(-1, -1, len(table.paths), -1).to(batch.dtype)
    # In float32, as they were trained: the best of them are what counts.
    scores = linear(x.float(), found.directions).view(*x.shape[:2], len(table.paths), -1)
    members = gating.experts[:, None, None].expand(*scores.shape[:3], -1)
    weights = _of_scores(gate, scores.gather(3, members), gating)
    # Equal scores would leave it to chance which are the best.
    return (weights if found.without is None else alike.where(found.without, weights)).to(batch.dtype)


def _means(x: Tensor, real: Tensor) -> Tensor:
    """Of the real tokens of x (m, l, d), (m, 1, d), float32."""
    import torch

    total = x.masked_fill(~real[..., None], 0).sum(1, keepdim=True, dtype=torch.float32)
    return total / real.sum(1)[:, None, None]
