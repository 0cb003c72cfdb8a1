"""What a static route does at one module, as one LoRA: exactly, or the nearest of a wanted rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.factors import LoraFactors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: A member's weight, and what its adapter does at a module.
Part = tuple[float, LoraFactors]


@dataclass(frozen=True)
class MergedModule:
    """y = W x + bias + B A x + shift, with ``a`` (r, d_in), ``b`` (d_out, r) and ``shift`` (d_out,) or None.

    ``exact_rank`` loses nothing but rounding. ``norm`` is the Frobenius norm of the route's delta at this module, and
    ``lost`` that of what ``b a`` lacks of it, both in float64 from unrounded factors.
    """

    a: Tensor
    b: Tensor
    shift: Tensor | None
    exact_rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """What is lost, as a share of the delta."""
        return self.lost / self.norm if self.norm else 0.0


def merge(
    parts: Sequence[Part],
    *,
    fused: bool = False,
    rank: int | None = None,
    dtype: torch.dtype,
    base_weight: Callable[[], Tensor] | None = None,
) -> MergedModule:
    """The one LoRA of some weighted ones, all of the same module and fitted to its base.

    Outputs averaged (paper section 4.2): delta = sum w_i s_i B_i A_i, which is [w_i s_i B_i] [A_i] with ranks side by
    side. Parameters averaged (``fused``, paper eq. 4): (sum w_i s_i B_i)(sum w_i A_i), ranks padded with zeros. Where
    that has more than ``rank`` ranks, it is cut to the largest singular values, the nearest of that rank in the
    Frobenius norm (Eckart and Young), shared evenly between the two factors; the product is not formed for it.

    Args:
        base_weight: W as (d_out, d_in); asked for only where a part has a gain, whose delta is
            diag(sum w_i (g_i - 1)) W beside the above.

    Raises:
        ValueError: a part has a gain, and base weights or rank are not given.
    """
    a, b = _averaged(parts) if fused else _side_by_side(parts)
    gains = [weight * (part.gain.double() - 1.0) for weight, part in parts if part.gain is not None]
    discarded = 0.0
    if gains:
        if base_weight is None or rank is None:
            raise ValueError("a gain is no LoRA; its nearest one needs base weights and a rank")
        dense = b @ a + sum(gains[1:], gains[0])[:, None] * base_weight().double()
        exact_rank, norm = min(dense.shape), float(dense.norm())
        a, b, discarded = _cut_dense(dense, rank)
    else:
        exact_rank, norm = min(a.shape[0], a.shape[1], b.shape[0]), _norm(a, b)
        if rank is not None and rank < a.shape[0]:
            a, b, discarded = _cut(a, b, rank)
    rounded_a, rounded_b = a.to(dtype).contiguous(), b.to(dtype).contiguous()
    # What was cut off is orthogonal to what was kept, and so to its rounding.
    lost = math.hypot(discarded, _difference(a, b, rounded_a.double(), rounded_b.double()))
    shifts = [weight * part.shift.double() for weight, part in parts if part.shift is not None]
    shift = sum(shifts[1:], shifts[0]).to(dtype) if shifts else None
    return MergedModule(rounded_a, rounded_b, shift, exact_rank, norm, lost)


def _side_by_side(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    import torch

    a = torch.cat([part.a.double() for _, part in parts])
    return a, torch.cat([part.b.double() * (weight * part.scale) for weight, part in parts], dim=1)


def _averaged(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import pad

    rank = max(part.rank for _, part in parts)
    a = [pad(part.a.double() * weight, (0, 0, 0, rank - part.rank)) for weight, part in parts]
    b = [pad(part.b.double() * (weight * part.scale), (0, rank - part.rank)) for weight, part in parts]
    return sum(a[1:], a[0]), sum(b[1:], b[0])


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of the nearest matrix of that rank, and the norm of what is cut off."""
    import torch

    columns, upper_b = torch.linalg.qr(b)
    rows, upper_a = torch.linalg.qr(a.T)
    new_a, new_b, discarded = _cut_dense(upper_b @ upper_a.T, rank)
    return new_a @ rows.T, columns @ new_b, discarded


def _cut_dense(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    import torch

    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root, float(values[rank:].norm())


def _norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of b a, by two matrices of r x r; rounding may leave a trace below zero."""
    return math.sqrt(max(float(((a @ a.T) * (b.T @ b)).sum()), 0.0))


def _difference(a: Tensor, b: Tensor, near_a: Tensor, near_b: Tensor) -> float:
    """Norm of b a - near_b near_a, whose terms are small each, so that nothing large cancels."""
    import torch

    return _norm(torch.cat([a, a - near_a]), torch.cat([b - near_b, near_b], dim=1))
