"""The device tier as a state machine: what its rows hold, who may go, and what it may weigh."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.engine.rank_pool import RankPool
from tests.engine.loras import ADAPTERS, CPU, GROUPS, SHAPES, factors_of

_RANKS = ({"q": 2, "v": 2}, {"q": 3, "k": 1, "v": 3}, {"o": 4}, {"q": 1, "k": 1, "v": 1, "o": 1}, {"k": 7, "o": 2})
CROWD = [factors_of(f"many {place}.", _RANKS[place % len(_RANKS)], seed=place) for place in range(30)]
#: Of one rank in all modules, in float32.
RANK_BYTES = 4 * sum(d_out + d_in for d_out, d_in in SHAPES.values())


def pool_of(budget_bytes: int) -> RankPool:
    return RankPool(GROUPS, SHAPES, dtype=torch.float32, device=CPU, budget_bytes=budget_bytes)


def factors_at(pool: RankPool, path: str) -> tuple[Tensor, Tensor]:
    """All rows of one module: A (rows, d_in) and s B^T (rows, d_out)."""
    table, member = pool.members[path]
    first, _, b = table.run_of(member)
    return table.a[:, member], b[:, member - first]


def check_rows(pool: RankPool, adapter: AdapterFactors, rows: tuple[int, ...]) -> None:
    assert len(rows) == adapter.rank
    for path in pool.members:
        a, b = factors_at(pool, path)
        want_a, want_b = torch.zeros(len(rows), a.shape[1]), torch.zeros(len(rows), b.shape[1])
        if (own := adapter.modules.get(path)) is not None:
            want_a[: own.rank], want_b[: own.rank] = own.a, own.scale * own.b.T
        torch.testing.assert_close(a[list(rows)], want_a, rtol=0, atol=0)
        torch.testing.assert_close(b[list(rows)], want_b, rtol=1e-6, atol=0)


class PoolMachine(RuleBasedStateMachine):
    @initialize(ranks=st.sampled_from([0, 3, 12, 40, 200]))
    def start(self, ranks: int) -> None:
        self.pool = pool_of(ranks * RANK_BYTES)
        self.pins: Counter[int] = Counter()
        self.rows: dict[int, tuple[int, ...]] = {}
        self.doomed: set[int] = set()

    @rule(place=st.integers(0, len(CROWD) - 1))
    def pin(self, place: int) -> None:
        before = self.pool.size_bytes
        rows = self.pool.pin(CROWD[place])
        assert rows == self.rows.get(place, rows)  # they stay where they are
        self.pins[place] += 1
        self.rows[place] = rows
        if self.pool.size_bytes > max(before, self.pool.budget_bytes):
            pinned = sum(CROWD[held].rank for held in self.rows)
            unused = [one for place, one in enumerate(CROWD) if one.digest in self.pool and place not in self.rows]
            last = max((row for rows in self.rows.values() for row in rows), default=0)
            length = self.pool.size_bytes // sum(4 * sum(SHAPES[path]) for group in self.pool.tables for path in group)
            # Only because of pins: all rows are pinned ones, or the last is, and rows do not move.
            assert (length == pinned + 1 and not unused) or length == last + 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(sorted(self.rows)))
        self.pool.unpin(CROWD[place].digest)
        self.pins[place] -= 1
        if not self.pins[place]:
            del self.rows[place]
            if place in self.doomed:
                assert CROWD[place].digest not in self.pool
            self.doomed.discard(place)

    @rule(place=st.integers(0, len(CROWD) - 1))
    def discard(self, place: int) -> None:
        digest = CROWD[place].digest
        held = digest in self.pool
        assert self.pool.discard(digest) == (held and place not in self.rows)
        assert (digest in self.pool) == (place in self.rows)
        if place in self.rows:
            self.doomed.add(place)

    @rule()
    def compact(self) -> None:
        self.pool.compact()
        if not self.rows:
            assert self.pool.size_bytes <= max(self.pool.budget_bytes, RANK_BYTES)

    @invariant()
    def what_is_pinned_is_there_and_nobody_elses(self) -> None:
        taken = [row for rows in self.rows.values() for row in rows]
        assert len(taken) == len(set(taken))
        assert 0 not in taken
        for place, rows in self.rows.items():
            assert CROWD[place].digest in self.pool
            check_rows(self.pool, CROWD[place], rows)

    @invariant()
    def row_zero_is_zero(self) -> None:
        for path in self.pool.members:
            for tensor in factors_at(self.pool, path):
                assert not tensor[0].any()

    @invariant()
    def every_byte_is_counted(self) -> None:
        tables = self.pool.tables.values()
        assert self.pool.size_bytes == sum(
            tensor.untyped_storage().nbytes() for table in tables for tensor in (table.a, *table.b)
        )
        held = sum(adapter.rank for adapter in CROWD if adapter.digest in self.pool)
        assert len(self.pool) == sum(adapter.digest in self.pool for adapter in CROWD)
        rank_bytes = sum(4 * sum(SHAPES[path]) for group in self.pool.tables for path in group)
        assert self.pool.used_bytes == held * rank_bytes

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for place, count in self.pins.items():
            for _ in range(count):
                self.pool.unpin(CROWD[place].digest)
        self.pool.compact()
        assert self.pool.size_bytes <= max(self.pool.budget_bytes, RANK_BYTES)
        for adapter in CROWD:  # what stayed through all that is still what it was
            if adapter.digest in self.pool:
                check_rows(self.pool, adapter, self.pool.pin(adapter))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_goes_first_and_never_one_that_is_pinned() -> None:
    pool = pool_of(RANK_BYTES * 13)  # row 0 and twelve ranks: three adapters of rank 4
    four = [factors_of(f"four{place}", dict.fromkeys(SHAPES, 4), seed=place) for place in range(5)]
    for place in (0, 1, 2, 0):
        pool.pin(four[place])
        pool.unpin(four[place].digest)
    pool.pin(four[3])
    assert [adapter.digest in pool for adapter in four] == [True, False, True, True, False]
    pool.pin(four[2])
    pool.pin(four[4])
    assert [adapter.digest in pool for adapter in four] == [False, False, True, True, True]
    assert pool.evictions == 2
    assert pool.size_bytes <= pool.budget_bytes


def test_modules_that_no_adapter_has_take_no_memory() -> None:
    pool = pool_of(1 << 20)
    assert pool.size_bytes == 0
    pool.pin(factors_of("attention", {"q": 2}, seed=0))
    assert pool.members.keys() == {"q", "k", "v"}  # the group, as they share a product


def test_a_module_that_is_new_to_a_full_pool_makes_room_instead_of_breaking_the_budget() -> None:
    pool = pool_of(RANK_BYTES * 40)
    small = [factors_of(f"small {place}.", {"q": 2}, seed=place) for place in range(60)]
    for adapter in small:
        pool.pin(adapter)
        pool.unpin(adapter.digest)
    pool.pin(factors_of("wide", dict.fromkeys(SHAPES, 2), seed=0))
    assert pool.size_bytes <= pool.budget_bytes
    kept = [adapter for adapter in small if adapter.digest in pool]
    assert 0 < len(kept) < len(small)
    for adapter in kept:
        check_rows(pool, adapter, pool.pin(adapter))


def test_the_next_owner_of_a_row_finds_nothing_of_the_last() -> None:
    pool = pool_of(0)
    pool.pin(ADAPTERS[4])  # rank 4 everywhere
    pool.unpin(ADAPTERS[4].digest)
    check_rows(pool, ADAPTERS[1], pool.pin(ADAPTERS[1]))  # rank 1, in two modules only
    assert ADAPTERS[4].digest not in pool


def test_factors_that_cannot_be_written_leave_no_trace() -> None:
    pool = pool_of(1 << 20)
    good, bad = factors_of("good", {"q": 2}, seed=0), factors_of("bad", {"q": 2, "k": 2}, seed=1)
    bad = AdapterFactors(bad.digest, {"q": bad.modules["q"], "k": ADAPTERS[4].modules["o"]})
    with pytest.raises((RuntimeError, IndexError)):
        pool.pin(bad)
    assert bad.digest not in pool
    check_rows(pool, good, pool.pin(good))
    assert pool.used_bytes * 63 == (pool.size_bytes - pool.size_bytes // 64) * 2  # only its own two of 63 rows are used


def test_a_growth_that_ran_out_of_memory_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_hub_sdk.engine import rank_pool

    pool, grow, calls = pool_of(1 << 20), rank_pool._longer, []

    def fail_at_the_second(tensor: Tensor, rows: int) -> Tensor:
        calls.append(rows)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")
        return grow(tensor, rows)

    first = [factors_of(f"one{place}", dict.fromkeys(SHAPES, 9), seed=place) for place in range(7)]
    rows = [pool.pin(adapter) for adapter in first]
    monkeypatch.setattr(rank_pool, "_longer", fail_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        pool.pin(CROWD[1])
    monkeypatch.setattr(rank_pool, "_longer", grow)
    pool._budget = 90 * RANK_BYTES  # now less than what the first try went for
    check_rows(pool, CROWD[1], pool.pin(CROWD[1]))
    for adapter, own in zip(first, rows, strict=True):
        check_rows(pool, adapter, own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_applied_in_float32_and_cast_once(dtype: torch.dtype) -> None:
    adapter = factors_of("half", {"q": 3, "k": 3}, seed=5, dtype=torch.float32)
    pool = RankPool(GROUPS, SHAPES, dtype=dtype, device=CPU, budget_bytes=1 << 20)
    rows = list(pool.pin(adapter))
    for path, own in adapter.modules.items():
        a, b = factors_at(pool, path)
        assert a[rows].equal(own.a.to(dtype))
        assert b[rows].equal((own.b.T * own.scale).to(dtype))


def test_a_batch_is_given_the_tables_that_its_own_adapters_have_and_nothing_for_one_that_left() -> None:
    pool = pool_of(1 << 20)
    for adapter in ADAPTERS:
        pool.pin(adapter)
    only_o, q_and_v = ADAPTERS[2], ADAPTERS[1]
    assert pool.members_of([only_o.digest]).keys() == {"o"}
    assert pool.members_of([q_and_v.digest]).keys() == {"q", "k", "v"}  # k shares their input, and its rows are zeros
    assert pool.members_of([only_o.digest, q_and_v.digest]).keys() == pool.members.keys()
    pool.unpin(only_o.digest)
    assert pool.discard(only_o.digest)
    assert pool.members_of([only_o.digest]) == {}  # its row was cancelled while its prompt was being read
