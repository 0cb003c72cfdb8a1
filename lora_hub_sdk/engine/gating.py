"""Weights from gates: each rank's activation times what its adapter weighs at that token (see ``TokenGate``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.composition.gates import TokenGate
    from lora_hub_sdk.engine.batch_lora import BatchLora, Gating
    from lora_hub_sdk.engine.rank_pool import Table

_ABSENT = float("-inf")


def gate_looked_up(hidden: Tensor, mixed: Tensor, x: Tensor, table: Table, batch: BatchLora) -> Tensor:
    """One token a row, ranks side by side. ``hidden`` and ``mixed`` (n, S), x (b, 1, d_in) -> (n, S).

    ``mixed`` is what ranks of rows without a gate keep.
    """
    members, rows = len(table.paths), len(batch.rows)
    for gating in batch.gating(padded=False):
        gate = batch.gates[gating.gate]
        scores = hidden.new_zeros(members, gating.present.numel())
        if gating.gate in table.gates:
            keys = table.gates[gating.gate].keys
            found = keys.view(-1, keys.shape[-1])[batch.lookup(members).index].view(members, -1, keys.shape[-1])
            queries = _queries(x, table, gating).view(rows, members, -1).transpose(0, 1)[:, batch.owners]
            scores.index_add_(1, gating.slot, (found * queries).sum(-1) * hidden)
        weights = _weights(gate, scores.view(members, rows, -1), gating.present)
        weighed = hidden * weights.reshape(members, -1)[:, gating.slot]
        mixed = weighed.where(gating.mine, mixed)
    return mixed


def gate_padded(hidden: Tensor, mixed: Tensor, x: Tensor | None, table: Table, batch: BatchLora) -> Tensor:
    """Ranks padded row by row. ``hidden`` and ``mixed`` (b, l, n, R), x (b, l, d_in) -> (b, l, n, R).

    x is None where the input is no vector, as an embedding's: there every member has the score 0.
    """
    rows, tokens, members, _ = hidden.shape
    for gating in batch.gating(padded=True):
        gate = batch.gates[gating.gate]
        slot = gating.slot[:, None, None].expand(hidden.shape)
        scores = hidden.new_zeros(rows, tokens, members, gating.present.shape[1])
        if x is not None and gating.gate in table.gates:
            keys = table.gates[gating.gate].keys
            found = keys.view(-1, keys.shape[-1])[batch.padded(members).index].view(rows * members, -1, keys.shape[-1])
            queries = _queries(x, table, gating).view(rows, tokens, members, -1).transpose(1, 2)
            products = (queries.reshape(rows * members, tokens, -1) @ found.transpose(1, 2)).view(
                rows, members, tokens, -1
            )
            # Places that are filled up have keys and activations of zero.
            scores.scatter_add_(3, slot, products.transpose(1, 2) * hidden)
        weights = _weights(gate, scores, gating.present[:, None, None])
        mixed = (hidden * weights.gather(3, slot)).where(gating.mine[:, None, None], mixed)
    return mixed


def _queries(x: Tensor, table: Table, gating: Gating) -> Tensor:
    from torch.nn.functional import linear

    return linear(x, table.gates[gating.gate].queries)


def _weights(gate: TokenGate, scores: Tensor, present: Tensor) -> Tensor:
    return gate.weights(scores.float().masked_fill(~present, _ABSENT)).to(scores.dtype)
