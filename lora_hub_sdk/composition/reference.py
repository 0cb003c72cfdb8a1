"""The paper's batched forms as it prints them: readable, slow, and the oracle of the tests.

They materialise a tensor of b * l * p * d elements; ``compose`` gives the same numbers from one LoRA per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.factors import LoraFactors

if TYPE_CHECKING:
    from torch import Tensor


def stack_padded(adapters: Sequence[LoraFactors]) -> tuple[Tensor, Tensor]:
    """A (p, r, d_in) and s B (p, d_out, r), with ranks zero-padded to the largest."""
    import torch

    rank = max(factors.rank for factors in adapters)
    a = [torch.nn.functional.pad(f.a.float(), (0, 0, 0, rank - f.rank)) for f in adapters]
    b = [torch.nn.functional.pad(f.b.float() * f.scale, (0, rank - f.rank)) for f in adapters]
    return torch.stack(a), torch.stack(b)


def mixture_einsum(x: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """Average of outputs over a batch (paper section 4.3): x (b, l, d_in), matrix (b, p) -> (b, l, d_out)."""
    import torch

    each = torch.einsum("bld,prd->blpr", x, a)
    each = torch.einsum("blpr,por->blpo", each, b)
    return torch.einsum("bp,blpo->blo", matrix, each)


def fusion_einsum(x: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """Average of parameters (paper eq. 4 over a batch): the product of the means, cross terms kept."""
    import torch

    mean_a = torch.einsum("bp,prd->brd", matrix, a)
    mean_b = torch.einsum("bp,por->bor", matrix, b)
    return torch.einsum("blr,bor->blo", torch.einsum("bld,brd->blr", x, mean_a), mean_b)


def ramole_einsum(x: Tensor, a: Tensor, b: Tensor, present: Tensor, gate_a: Tensor, gate_b: Tensor) -> Tensor:
    """Weights for each token from a gate (arXiv 2406.16989), with every v_i and k_i in memory.

    x (b, l, d_in); ``present`` (b, p) tells which of the p adapters are members of a row; gate_a (width, d_in), gate_b
    (d_out, width) -> (b, l, d_out). A row without members gets zeros.
    """
    import torch

    values = torch.einsum("bld,prd,por->blpo", x, a, b)
    query = torch.einsum("bld,wd->blw", x, gate_a)
    keys = torch.einsum("blpo,ow->blpw", values, gate_b)
    scores = torch.einsum("blw,blpw->blp", query, keys) / gate_a.shape[0] ** 0.5
    scores = scores.masked_fill(~present[:, None], -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return torch.einsum("blp,blpo->blo", weights, values)
