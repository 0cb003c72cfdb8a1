"""The device tier: every adapter in use once, as rows of stacked factors that all requests share.

An adapter of rank r takes r rows, the same ones in every module: rows of A, and rows of s B^T. A module that it lacks,
or where it has a smaller rank, holds zeros there. Row 0 stays zero for whatever has to point somewhere. Rows are
taken one by one, so the pool never fragments. What an adapter has beside factors lies beside the tables, see
``Extras``; so do the keys of gates, one for each row and module, and the directions of gates over experts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast
from weakref import ReferenceType, ref

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.gates import Gate, TokenGate
from lora_hub_sdk.engine.extras import Extras, extras_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_hub_sdk.engine.base_model import BaseModel

_FIRST_ROWS: Final = 64
#: Tables are made smaller once they have so many times the rows that are used.
_LOOSE: Final = 4


@dataclass
class Table:
    """The factors of the modules ``paths``, which share an input: ``a`` (rows, n, d_in).

    ``b`` holds for each run of modules with equally wide outputs one tensor (rows, m, d_out). By their digests,
    ``gates`` and ``experts`` have what each gate needs here.
    """

    paths: tuple[str, ...]
    a: Tensor
    b: list[Tensor]
    gates: dict[str, GateTable] = field(default_factory=dict)
    experts: dict[str, ExpertTable] = field(default_factory=dict)

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
class GateTable:
    """A gate at the modules of a table: ``queries`` (n * width, d_in), ``keys`` (rows, n, width).

    ``maps`` (d_out, width) of each module make keys of the rows of its b.
    """

    queries: Tensor
    maps: list[Tensor]
    keys: Tensor


@dataclass
class ExpertTable:
    """A gate over experts at the modules of a table: ``directions`` (n * experts, d_in), float32.

    ``without`` (n, 1) tells the modules that it has none for; None where there are no such.
    """

    directions: Tensor
    without: Tensor | None


class UnprovenError(Exception):
    """Two copies of one content were read, and it is not known yet whether the first is what it should be."""


@dataclass
class _Held:
    rows: tuple[int, ...]
    groups: frozenset[tuple[str, ...]] = frozenset()
    pins: int = 0
    #: What the rows were written from, until that is proven.
    source: ReferenceType[AdapterFactors] | None = None
    doomed: bool = False


class RankPool:
    """Adapters by content digest within a budget of bytes; those in use are pinned, the others go least recent first.

    Not thread-safe: the thread that owns the model owns it.

    Args:
        groups: the modules that share an input, see ``input_groups``; a group's table exists from the first adapter on
            that has any of them.
        shapes: (d_out, d_in) of each module.
        modules: the base's modules by path, for adapters that replace some.
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
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._group_of = {path: group for group in groups for path in group}
        self._budget = budget_bytes
        self._modules = modules or {}
        #: The gates that rows may have, by digest.
        self.gates: dict[str, Gate] = {}
        self._present: frozenset[str] = frozenset()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._rows = _FIRST_ROWS
        self._free = list(range(_FIRST_ROWS - 1, 0, -1))
        self.tables: dict[tuple[str, ...], Table] = {}
        #: For each module that any adapter has had its table and its place there.
        self.members: dict[str, tuple[Table, int]] = {}
        #: What adapters have beside factors, by digest.
        self.extras: dict[str, Extras] = {}
        self.evictions = 0

    @classmethod
    def of(cls, base: BaseModel, budget_bytes: int) -> RankPool:
        """A pool for the adapters of a base model."""
        shapes, groups = dict(base.shapes), list(base.groups)
        if base.embedding is not None:
            vocabulary, width = cast("nn.Embedding", base.modules[base.embedding]).weight.shape
            shapes[base.embedding] = (width, vocabulary)
            groups.append((base.embedding,))
        return cls(
            groups, shapes, dtype=base.dtype, device=base.device, budget_bytes=budget_bytes, modules=base.modules
        )

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def __len__(self) -> int:
        return len(self._held)

    @property
    def budget_bytes(self) -> int:
        return self._budget

    @property
    def size_bytes(self) -> int:
        """What the tables take, free rows included, and what lies beside them."""
        directions = (one.directions for table in list(self.tables.values()) for one in list(table.experts.values()))
        return sum(one.numel() * one.element_size() for one in (*self._tensors(), *directions)) + self._extra_bytes

    @property
    def used_bytes(self) -> int:
        """What the adapters in it take."""
        rows = sum(len(held.rows) for held in self._held.values())
        return self._rank_bytes(self.tables) * rows + self._extra_bytes

    @property
    def _extra_bytes(self) -> int:
        return sum(extras.size_bytes for extras in list(self.extras.values()))

    def pin(self, factors: AdapterFactors, *, proven: bool = True) -> tuple[int, ...]:
        """The adapter's rows, which stay until ``unpin``; it is copied in where it is not there yet.

        Args:
            proven: whether the factors are known to be the content that their digest promises. Until ``prove`` says
                so, rows written from them are used for the very same factors alone.

        Raises:
            UnprovenError: rows from other factors of that digest, not proven either, are pinned; try again later.
        """
        held = self._held.get(factors.digest)
        if held is not None and held.source is not None and held.source() is not factors:
            if held.pins:
                raise UnprovenError(factors.digest)
            self._forget(factors.digest)
            held = None
        if held is None:
            extras = extras_of(factors, self._modules, dtype=self._dtype, device=self._device)
            if extras is not None:
                self.extras[factors.digest] = extras
            try:
                rows = self._take(factors)
            except BaseException:
                self.extras.pop(factors.digest, None)
                raise
            groups = frozenset(self._group_of[path] for path in factors.modules)
            held = self._held[factors.digest] = _Held(rows, groups, source=None if proven else ref(factors))
            try:
                self._write(factors, held.rows)
            except BaseException:
                self._forget(factors.digest)
                raise
        self._held.move_to_end(factors.digest)
        held.pins += 1
        return held.rows

    def members_of(self, digests: Iterable[str]) -> dict[str, tuple[Table, int]]:
        """As ``members``, of the tables that any of these adapters has a part in.

        One that is no longer here had its last user go; the row it was for is not read any more.
        """
        held = (self._held[digest] for digest in digests if digest in self._held)
        groups = {group for one in held for group in one.groups}
        return {path: found for path, found in self.members.items() if found[0].paths in groups}

    def prove(self, factors: AdapterFactors) -> None:
        """These factors are what their digest promises, and so are rows that were written from them."""
        held = self._held.get(factors.digest)
        if held is not None and held.source is not None and held.source() is factors:
            held.source = None

    def unpin(self, digest: str) -> None:
        """One user less."""
        held = self._held[digest]
        held.pins -= 1
        if held.doomed and not held.pins:
            self._forget(digest)

    def discard(self, digest: str) -> bool:
        """Forget an adapter; False while somebody has it pinned, and then it goes with the last pin."""
        held = self._held.get(digest)
        if held is None:
            return False
        if held.pins:
            held.doomed = True
            return False
        self._forget(digest)
        return True

    def use_gates(self, gates: Collection[Gate]) -> None:
        """Keep what these gates need from now on; what others need goes when nothing is pinned."""
        for gate in gates:
            self.add_gate(gate)
        self._present = frozenset(gate.digest for gate in gates)

    def add_gate(self, gate: Gate) -> None:
        """Rows may have this gate until nothing is pinned."""
        if gate.digest not in self.gates:
            for table in self.tables.values():
                self._prepare(table, gate)
            self.gates[gate.digest] = gate

    def compact(self) -> None:
        """Give memory back that a burst took; only while nothing is pinned, as rows move."""
        if any(held.pins for held in self._held.values()):
            return
        for digest in self.gates.keys() - self._present:
            del self.gates[digest]
            for table in self.tables.values():
                table.gates.pop(digest, None)
                table.experts.pop(digest, None)
        allowed = self._allowed(self.tables)
        while self.used_bytes + self._rank_bytes(self.tables) > self._budget and self._evict():
            pass
        kept = [0, *(row for held in self._held.values() for row in held.rows)]
        if self._rows > max(_FIRST_ROWS, _LOOSE * len(kept)) or self._rows > max(allowed, 1):
            self._rebuild(kept, max(len(kept), min(_FIRST_ROWS, allowed)))

    def _take(self, factors: AdapterFactors) -> tuple[int, ...]:
        """Rows for an adapter: free ones, or new ones within the budget, or those of others."""
        self._make_tables(factors)
        while self.used_bytes + factors.rank * self._rank_bytes(self.tables) > self._budget and self._extra_bytes:
            if not self._evict():
                break
        while len(self._free) < factors.rank:
            needed, allowed = self._rows + factors.rank - len(self._free), self._allowed(self.tables)
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
        self.extras.pop(digest, None)
        self._free.extend(reversed(rows))  # they are taken from the end, and side by side again

    def _grow(self, rows: int) -> None:
        for table in self.tables.values():
            table.a = _longer(table.a, rows)
            table.b = [_longer(tensor, rows) for tensor in table.b]
            for gate in table.gates.values():
                gate.keys = _longer(gate.keys, rows)
        self._free.extend(range(rows - 1, self._rows - 1, -1))
        self._rows = rows

    def _cut(self, rows: int) -> None:
        """Tables of no more rows than that, as far as pins allow it: rows stay where they are."""
        last = max((row for held in self._held.values() if held.pins for row in held.rows), default=0)
        rows = max(rows, last + 1)
        if rows >= self._rows:
            return
        for digest in [digest for digest, held in self._held.items() if max(held.rows, default=0) >= rows]:
            self._forget(digest)
            self.evictions += 1
        for table in self.tables.values():
            table.a = table.a[:rows].clone()
            table.b = [tensor[:rows].clone() for tensor in table.b]
            for gate in table.gates.values():
                gate.keys = gate.keys[:rows].clone()
        self._rows, self._free = rows, [row for row in self._free if row < rows]

    def _rebuild(self, kept: list[int], rows: int) -> None:
        """Tables of so many rows, the first of which are those at ``kept``."""
        import torch

        index = torch.tensor(kept, device=self._device)
        for table in self.tables.values():
            table.a = _longer(table.a[index], rows)
            table.b = [_longer(tensor[index], rows) for tensor in table.b]
            for gate in table.gates.values():
                gate.keys = _longer(gate.keys[index], rows)
        moved = {old: new for new, old in enumerate(kept)}
        for held in self._held.values():
            held.rows = tuple(moved[row] for row in held.rows)
        self._rows, self._free = rows, list(range(rows - 1, len(kept) - 1, -1))

    def _make_tables(self, factors: AdapterFactors) -> None:
        import torch

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(self._rows, *shape, dtype=self._dtype, device=self._device)

        groups = dict.fromkeys(self._group_of[path] for path in factors.modules)
        if groups.keys() <= self.tables.keys():
            return
        self._cut(self._allowed(self.tables | groups))
        for group in groups:
            if group not in self.tables:
                widths = [self._shapes[path][0] for path in group]
                runs = [widths.count(width) for width in dict.fromkeys(widths)]
                table = self.tables[group] = Table(
                    group,
                    zeros(len(group), self._shapes[group[0]][1]),
                    [zeros(count, width) for count, width in zip(runs, dict.fromkeys(widths), strict=True)],
                )
                self.members |= {path: (table, place) for place, path in enumerate(group)}
                for gate in self.gates.values():
                    self._prepare(table, gate)

    def _prepare(self, table: Table, gate: Gate) -> None:
        """What a gate needs at a table."""
        import torch

        if not isinstance(gate, ExpertGate):
            self._make_keys(table, gate)
            return
        found = [gate.directions.get(path) for path in table.paths]
        without = [one is None for one in found]
        if all(without):
            return
        none = torch.zeros(len(gate.experts), self._shapes[table.paths[0]][1])
        table.experts[gate.digest] = ExpertTable(
            torch.cat([none if one is None else one for one in found]).to(self._device),
            torch.tensor(without, device=self._device)[:, None] if any(without) else None,
        )

    def _make_keys(self, table: Table, gate: TokenGate) -> None:
        import torch

        queries, maps = [], []
        for path in table.paths:
            d_out, d_in = self._shapes[path]
            own = gate.module(path) or (torch.zeros(gate.width, d_in), torch.zeros(d_out, gate.width))
            queries.append(self._here(own[0]))
            maps.append(self._here(own[1]))
        keys = torch.zeros(self._rows, len(maps), gate.width, dtype=self._dtype, device=self._device)
        made = table.gates[gate.digest] = GateTable(torch.cat(queries), maps, keys)
        for member in range(len(maps)):
            self._write_keys(table, made, member, slice(None))

    def _write_keys(self, table: Table, gate: GateTable, member: int, rows: slice | Tensor) -> None:
        first, _, b = table.run_of(member)
        gate.keys[rows, member] = b[rows, member - first] @ gate.maps[member]

    def _rank_bytes(self, groups: Iterable[tuple[str, ...]]) -> int:
        """What one row takes in the tables of these groups."""
        return self._dtype.itemsize * sum(sum(self._shapes[path]) for group in groups for path in group)

    def _allowed(self, groups: Iterable[tuple[str, ...]]) -> int:
        """How many rows the budget has room for."""
        return max(self._budget - self._extra_bytes, 0) // max(self._rank_bytes(groups), 1)

    def _write(self, factors: AdapterFactors, rows: tuple[int, ...]) -> None:
        import torch

        if not rows:
            return
        places = torch.tensor(rows, device=self._device)
        side_by_side = rows == tuple(range(rows[0], rows[0] + len(rows)))
        if any(path not in factors.modules or factors.modules[path].rank < len(rows) for path in self.members):
            # Where nothing is written there must be zeros, and not what an earlier owner of these rows had there.
            for tensor in self._tensors():
                tensor.index_fill_(0, places, 0)
        for path, one in factors.modules.items():
            table, member = self.members[path]
            first, _, b = table.run_of(member)
            a, b = table.a[:, member], b[:, member - first]
            if side_by_side:  # as they mostly are; then no index is needed, nor a copy in another dtype
                place = slice(rows[0], rows[0] + one.rank)
                a[place].copy_(one.a)
                if _is_exact(one.scale):
                    b[place].copy_(one.b.t()).mul_(one.scale)
                else:
                    b[place].copy_(one.b.t().float() * one.scale)
            else:
                own = places[: one.rank]
                a.index_copy_(0, own, self._here(one.a))
                b.index_copy_(0, own, self._here(one.b.t().float() * one.scale))
        for table in self.tables.values():
            for gate in table.gates.values():
                for member in range(len(table.paths)):
                    self._write_keys(table, gate, member, places)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype)

    def _tensors(self) -> Iterator[Tensor]:
        """Those with the pool's rows."""
        for table in list(self.tables.values()):  # statistics ask from other threads
            yield table.a
            yield from table.b
            yield from (gate.keys for gate in list(table.gates.values()))


def _is_exact(scale: float) -> bool:
    """Whether numbers of any precision are multiplied by it without rounding, as by a power of two."""
    return abs(math.frexp(scale)[0]) == 0.5


def _longer(tensor: Tensor, rows: int) -> Tensor:
    if len(tensor) >= rows:  # a growth that ran out of memory got this far
        return tensor
    grown = tensor.new_zeros((rows, *tensor.shape[1:]))
    grown[: len(tensor)] = tensor
    return grown
