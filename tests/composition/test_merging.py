"""One LoRA for several: against the dense matrices that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.composition.factors import LoraFactors
from lora_hub_sdk.composition.merging import MergedModule, Part, merge

D_OUT, D_IN = 20, 28


def parts(*ranks: int, gain: bool = False, shift: bool = False) -> list[Part]:
    random = torch.Generator().manual_seed(sum(ranks))
    return [
        (
            0.2 + 0.1 * place,
            LoraFactors(
                torch.randn(rank, D_IN, generator=random),
                torch.randn(D_OUT, rank, generator=random),
                scale=1.5 - place,
                gain=1 + 0.1 * torch.randn(D_OUT, generator=random) if gain else None,
                shift=torch.randn(D_OUT, generator=random) if shift else None,
            ),
        )
        for place, rank in enumerate(ranks)
    ]


def dense(given: list[Part], *, fused: bool = False) -> Tensor:
    if not fused:
        return sum((weight * one.scale * (one.b.double() @ one.a.double()) for weight, one in given), torch.zeros(()))
    rank = max(one.rank for _, one in given)
    a, b = torch.zeros(rank, D_IN, dtype=torch.float64), torch.zeros(D_OUT, rank, dtype=torch.float64)
    for weight, one in given:
        a[: one.rank] += weight * one.a.double()
        b[:, : one.rank] += weight * one.scale * one.b.double()
    return b @ a


def product(found: MergedModule) -> Tensor:
    return found.b.double() @ found.a.double()


@pytest.mark.parametrize("fused", [False, True])
def test_without_a_rank_nothing_but_rounding_is_lost(fused: bool) -> None:
    given = parts(3, 1, 6)
    found, expected = merge(given, fused=fused, dtype=torch.float32), dense(given, fused=fused)
    assert found.a.shape == (6 if fused else 10, D_IN)
    assert found.norm == pytest.approx(float(expected.norm()))
    assert float((product(found) - expected).norm()) == pytest.approx(found.lost, rel=1e-3)
    assert 0.0 < found.error < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_cut_is_the_nearest_of_its_rank_and_tells_its_true_error(fused: bool, dtype: torch.dtype) -> None:
    given = parts(8, 3, 5)
    expected = dense(given, fused=fused)
    values = torch.linalg.svdvals(expected)
    for rank in range(1, int(torch.linalg.matrix_rank(expected))):
        found = merge(given, fused=fused, rank=rank, dtype=dtype)
        assert found.a.shape == (rank, D_IN)
        assert float((product(found) - expected).norm()) == pytest.approx(found.lost, rel=2e-3)
        assert found.lost >= float(values[rank:].norm()) * (1 - 1e-9)
        if dtype == torch.float64:
            assert found.lost == pytest.approx(float(values[rank:].norm()))


def test_the_two_sides_of_a_cut_have_the_same_norm() -> None:
    found = merge(parts(8, 3), rank=4, dtype=torch.float64)
    assert torch.allclose(found.a.norm(dim=1), found.b.norm(dim=0))


def test_a_rank_that_is_enough_cuts_nothing() -> None:
    given = parts(2, 3)
    assert merge(given, rank=5, dtype=torch.float64).error < 1e-15
    assert torch.equal(merge(given, rank=9, dtype=torch.float32).b, merge(given, dtype=torch.float32).b)


def test_more_ranks_than_a_matrix_has_rows_are_exact_at_its_rows() -> None:
    given = parts(16, 16)
    found = merge(given, rank=D_OUT, dtype=torch.float64)
    assert merge(given, dtype=torch.float64).exact_rank == found.exact_rank == found.a.shape[0] == D_OUT
    assert found.error < 1e-14


def test_shifts_are_added_with_their_weights() -> None:
    given = [*parts(2, 3, shift=True), *parts(1)]
    found = merge(given, dtype=torch.float64).shift
    assert found is not None
    assert torch.allclose(found, sum(w * one.shift.double() for w, one in given if one.shift is not None))  # type: ignore[arg-type]
    assert merge(parts(1), dtype=torch.float32).shift is None


@pytest.mark.parametrize("fused", [False, True])
def test_gains_become_the_nearest_lora_of_what_they_do_to_the_base_weight(fused: bool) -> None:
    given = [*parts(2, 3, gain=True), *parts(4)]
    weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(9))
    gain = sum((w * (one.gain.double() - 1) for w, one in given if one.gain is not None), torch.zeros(()))
    expected = dense(given, fused=fused) + gain[:, None] * weight
    found = merge(given, fused=fused, rank=6, dtype=torch.float32, base_weight=lambda: weight)
    assert float((product(found) - expected).norm()) == pytest.approx(found.lost, rel=1e-3)
    assert found.lost == pytest.approx(float(torch.linalg.svdvals(expected)[6:].norm()))
    assert merge(given, fused=fused, rank=20, dtype=torch.float64, base_weight=lambda: weight).error < 1e-14


def test_a_gain_without_a_rank_is_no_lora() -> None:
    with pytest.raises(ValueError, match="no LoRA"):
        merge(parts(2, gain=True), dtype=torch.float32, base_weight=lambda: torch.zeros(D_OUT, D_IN))


def test_a_module_that_only_has_a_shift_has_no_ranks() -> None:
    one = LoraFactors(torch.zeros(0, D_IN), torch.zeros(D_OUT, 0), 1.0, shift=torch.ones(D_OUT))
    found = merge([(0.5, one)], rank=3, dtype=torch.float32)
    assert (found.a.shape, found.b.shape, found.norm, found.error) == ((0, D_IN), (D_OUT, 0), 0.0, 0.0)
    assert found.shift is not None
    assert found.shift.tolist() == [0.5] * D_OUT
