"""The rectangle of keys and values against one list of tensors per row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from lora_hub_sdk.engine import kv_cache
from lora_hub_sdk.engine.kv_cache import RowsCache
from lora_hub_sdk.engine.running import drop_places

LAYERS, HEADS, SIZE = 2, 2, 3
CPU = torch.device("cpu")
#: What a row holds: (2 * layers, heads, tokens, d), all its keys and values by layer.
Content = Tensor


def prefilled(rows: list[Content]) -> Any:
    """A cache of these rows as a prefill leaves it: left-padded, and something of its own where the padding is."""
    width = max(row.shape[2] for row in rows)
    whole = torch.full((2 * LAYERS, len(rows), HEADS, width, SIZE), -7.0)
    for place, row in enumerate(rows):
        whole[:, place, :, width - row.shape[2] :] = row
    return SimpleNamespace(
        layers=[SimpleNamespace(keys=whole[2 * at], values=whole[2 * at + 1]) for at in range(LAYERS)]
    )


def step(cache: RowsCache, new: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row, ``new`` (2 * layers, rows, heads, 1, d); what attention sees, and its mask."""
    cache.reserve_column()
    mask = cache.mask(CPU)
    seen = []
    for place, layer in enumerate(cache.cache.layers):
        seen += layer.update(new[2 * place], new[2 * place + 1])
    cache.advance()
    return torch.stack(seen), mask


def check(seen: Tensor, mask: Tensor, rows: list[Content]) -> None:
    assert seen.shape[1] == len(rows) == len(mask)
    assert seen.shape[3] == mask.shape[1] == max(row.shape[2] for row in rows)
    for place, row in enumerate(rows):
        assert mask[place].tolist() == [False] * (mask.shape[1] - row.shape[2]) + [True] * row.shape[2]
        mine = seen[:, place, :, mask.shape[1] - row.shape[2] :]
        assert torch.equal(mine.nan_to_num(1e9), row.nan_to_num(1e9))
        if not row.isnan().any():  # whatever masked places hold, zero times it is zero
            assert seen[:, place].isfinite().all()


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = RowsCache(LAYERS)
        self.rows: list[Content] = []
        self.count = 0

    def fresh(self, *shape: int) -> Tensor:
        """Numbers that occur nowhere else."""
        size = int(torch.Size(shape).numel())
        self.count += size
        return torch.arange(self.count - size, self.count, dtype=torch.float32).view(shape)

    @rule(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), poison=st.booleans())
    def join(self, lengths: list[int], poison: bool) -> None:
        new = [self.fresh(2 * LAYERS, HEADS, length, SIZE) for length in lengths]
        if poison:
            new[-1][:] = torch.nan
        self.cache.join(prefilled(new), lengths)
        self.rows += new

    @precondition(lambda self: self.rows)
    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            new = self.fresh(2 * LAYERS, len(self.rows), HEADS, 1, SIZE)
            for place, row in enumerate(self.rows):
                if row.isnan().any():
                    new[:, place] = torch.nan
            seen, mask = step(self.cache, new)
            self.rows = [torch.cat([row, new[:, place]], 2) for place, row in enumerate(self.rows)]
        check(seen, mask, self.rows)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        places = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4, unique=True))
        self.cache.drop(places)
        drop_places(self.rows, places)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.rows = []

    @invariant()
    def it_is_as_wide_as_its_longest_row(self) -> None:
        assert self.cache.width == max((row.shape[2] for row in self.rows), default=0)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def row_of(length: int, value: float) -> Content:
    return torch.full((2 * LAYERS, HEADS, length, SIZE), value)


def test_what_is_no_number_never_reaches_the_next_row_of_its_place() -> None:
    cache = RowsCache(LAYERS)
    cache.join(prefilled([row_of(5, 1.0), row_of(9, torch.nan)]), [5, 9])
    step(cache, torch.full((2 * LAYERS, 2, HEADS, 1, SIZE), torch.nan))
    cache.drop([0, 1])
    long, short = row_of(12, 2.0), row_of(3, 3.0)
    cache.join(prefilled([long]), [12])
    cache.join(prefilled([short]), [3])  # takes the place of the one that was none, with places masked before it
    new = torch.full((2 * LAYERS, 2, HEADS, 1, SIZE), 4.0)
    seen, mask = step(cache, new)
    check(seen, mask, [torch.cat([long, new[:, 0]], 2), torch.cat([short, new[:, 1]], 2)])


def test_an_idle_cache_gives_a_large_buffer_back_and_keeps_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = RowsCache(LAYERS)
    cache.join(prefilled([row_of(5, 1.0)]), [5])
    small = cache.size_bytes
    cache.drop([0])
    assert cache.size_bytes == small > 0
    monkeypatch.setattr(kv_cache, "_IDLE_BYTES", small)
    cache.join(prefilled([row_of(500, 1.0)] * 3), [500] * 3)
    assert cache.size_bytes >= 3 * 500 / 64 * small
    cache.drop([0, 2])
    assert cache.size_bytes > small
    cache.drop([0])
    assert cache.size_bytes == 0
    cache.join(prefilled([row_of(5, 2.0)]), [5])
    seen, mask = step(cache, torch.zeros(2 * LAYERS, 1, HEADS, 1, SIZE))
    check(seen, mask, [torch.cat([row_of(5, 2.0), torch.zeros(2 * LAYERS, HEADS, 1, SIZE)], 2)])


def test_rows_that_come_and_go_for_long_need_no_more_than_they_do_at_once() -> None:
    """Columns move to the right for ever; the buffer must not."""
    cache = RowsCache(LAYERS)
    cache.join(prefilled([row_of(10, 0.0)]), [10])
    sizes = set()
    for turn in range(300):
        cache.join(prefilled([row_of(10, float(turn))]), [10])
        for _ in range(5):
            step(cache, torch.full((2 * LAYERS, 2, HEADS, 1, SIZE), float(turn)))
        cache.drop([0])
        sizes.add(cache.size_bytes)
    assert len(sizes) == 1
