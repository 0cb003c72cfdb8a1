"""The device tier: every adapter in use once, as rows of stacked factors that all requests share.

An adapter of rank r takes r rows, the same ones in every module: rows of A, and rows of s B^T. A module that it lacks,
or where it has a smaller rank, holds zeros there. Row 0 stays zero for whatever has to point somewhere. Rows are
taken one by one, so the pool never fragments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.composition.factors import AdapterFactors, LoraFactors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FIRST_ROWS: Final = 64
#: Tables are made smaller once they have so many times the rows that are used.
_LOOSE: Final = 4


@dataclass
class Table:
    """The factors of the modules ``paths``, which share an input: ``a`` (rows, n, d_in).

    ``b`` holds for each run of modules with equally wide outputs one tensor (rows, m, d_out).
    """

    paths: tuple[str, ...]
    a: Tensor
    b: list[Tensor]

    def run_of(self, member: int) -> tuple[int, int, Tensor]:
        """Of the module at that place of ``paths``: the first and the last but one of its run, and its run's tensor."""
        first = 0
        for tensor in self.b:
            last = first + tensor.shape[1]
            if member < last:
                return first, last, tensor
            first = last
        raise IndexError(member)


@dataclass
class _Held:
    rows: tuple[int, ...]
    pins: int = 0


class RankPool:
    """Adapters by content digest within a budget of bytes; those in use are pinned, the others go least recent first.

    Not thread-safe: the thread that owns the model owns it.

    Args:
        groups: the modules that share an input, see ``input_groups``; a group's table exists from the first adapter on
            that has any of them.
        shapes: (d_out, d_in) of each module.
        budget_bytes: what the tables may take, unless what is pinned at once takes more.
    """

    def __init__(
        self,
        groups: Sequence[tuple[str, ...]],
        shapes: Mapping[str, tuple[int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._group_of = {path: group for group in groups for path in group}
        self._budget = budget_bytes
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._rows = _FIRST_ROWS
        self._free = list(range(_FIRST_ROWS - 1, 0, -1))
        self.tables: dict[tuple[str, ...], Table] = {}
        #: For each module that any adapter has had its table and its place there.
        self.members: dict[str, tuple[Table, int]] = {}
        self.evictions = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def budget_bytes(self) -> int:
        return self._budget

    @property
    def size_bytes(self) -> int:
        """What the tables take, free rows included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def used_bytes(self) -> int:
        """What the rows of the adapters in it take."""
        return self._rank_bytes * sum(len(held.rows) for held in self._held.values())

    @property
    def _rank_bytes(self) -> int:
        return self.size_bytes // self._rows

    def pin(self, factors: AdapterFactors) -> tuple[int, ...]:
        """The adapter's rows, which stay until ``unpin``; it is copied in where it is not there yet."""
        held = self._held.get(factors.digest)
        if held is None:
            held = self._held[factors.digest] = _Held(self._take(factors))
            try:
                self._write(factors, held.rows)
            except BaseException:
                self._forget(factors.digest)
                raise
        self._held.move_to_end(factors.digest)
        held.pins += 1
        return held.rows

    def unpin(self, digest: str) -> None:
        """One user less."""
        self._held[digest].pins -= 1

    def discard(self, digest: str) -> bool:
        """Forget an adapter that nobody has pinned; False while somebody has."""
        held = self._held.get(digest)
        if held is None or held.pins:
            return False
        self._forget(digest)
        return True

    def compact(self) -> None:
        """Give memory back that a burst took; only while nothing is pinned, as rows move."""
        if any(held.pins for held in self._held.values()):
            return
        while self.used_bytes > self._budget and self._evict():
            pass
        used = sum(len(held.rows) for held in self._held.values())
        if self._rows <= max(_FIRST_ROWS, _LOOSE * (used + 1)) and self.size_bytes <= self._budget:
            return
        kept = [0, *(row for held in self._held.values() for row in held.rows)]
        self._rebuild(kept, max(_FIRST_ROWS, len(kept)))

    def _take(self, factors: AdapterFactors) -> tuple[int, ...]:
        """Rows for an adapter: free ones, or new ones within the budget, or those of others."""
        self._make_tables(factors)
        while len(self._free) < factors.rank:
            needed, allowed = self._rows + factors.rank - len(self._free), self._budget // max(self._rank_bytes, 1)
            if needed <= allowed:
                self._grow(min(max(2 * self._rows, needed), allowed))
            elif not self._evict():
                self._grow(needed)
        return tuple(self._free.pop() for _ in range(factors.rank))

    def _evict(self) -> bool:
        for digest, held in self._held.items():
            if not held.pins:
                self._forget(digest)
                self.evictions += 1
                return True
        return False

    def _forget(self, digest: str) -> None:
        rows = self._held.pop(digest).rows
        self._free.extend(rows)
        import torch

        # Zeros, because the next owner of a row may lack a module that this one had.
        index = torch.tensor(rows, device=self._device)
        for tensor in self._tensors():
            tensor.index_fill_(0, index, 0)

    def _grow(self, rows: int) -> None:
        for table in self.tables.values():
            table.a = _longer(table.a, rows)
            table.b = [_longer(tensor, rows) for tensor in table.b]
        self._free.extend(range(rows - 1, self._rows - 1, -1))
        self._rows = rows

    def _rebuild(self, kept: list[int], rows: int) -> None:
        """Tables of so many rows, the first of which are those at ``kept``."""
        import torch

        index = torch.tensor(kept, device=self._device)
        for table in self.tables.values():
            table.a = _longer(table.a[index], rows)
            table.b = [_longer(tensor[index], rows) for tensor in table.b]
        moved = {old: new for new, old in enumerate(kept)}
        for held in self._held.values():
            held.rows = tuple(moved[row] for row in held.rows)
        self._rows, self._free = rows, list(range(rows - 1, len(kept) - 1, -1))

    def _make_tables(self, factors: AdapterFactors) -> None:
        import torch

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(self._rows, *shape, dtype=self._dtype, device=self._device)

        for group in dict.fromkeys(self._group_of[path] for path in factors.modules):
            if group not in self.tables:
                widths = [self._shapes[path][0] for path in group]
                runs = [widths.count(width) for width in dict.fromkeys(widths)]
                table = self.tables[group] = Table(
                    group,
                    zeros(len(group), self._shapes[group[0]][1]),
                    [zeros(count, width) for count, width in zip(runs, dict.fromkeys(widths), strict=True)],
                )
                self.members |= {path: (table, place) for place, path in enumerate(group)}

    def _write(self, factors: AdapterFactors, rows: tuple[int, ...]) -> None:
        import torch

        places = torch.tensor(rows, device=self._device)
        for path, one in factors.modules.items():
            table, member = self.members[path]
            first, _, b = table.run_of(member)
            own = places[: one.rank]
            table.a[:, member].index_copy_(0, own, self._here(one.a))
            b[:, member - first].index_copy_(0, own, self._here(_scaled(one)))

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)

    def _tensors(self) -> Iterator[Tensor]:
        for table in self.tables.values():
            yield table.a
            yield from table.b


def _scaled(factors: LoraFactors) -> Tensor:
    """s B^T (r, d_out), multiplied in float32."""
    b = factors.b.t()
    return b if factors.scale == 1.0 else b.float() * factors.scale


def _longer(tensor: Tensor, rows: int) -> Tensor:
    grown = tensor.new_zeros((rows, *tensor.shape[1:]))
    grown[: len(tensor)] = tensor
    return grown
