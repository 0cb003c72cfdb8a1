"""The rows of one forward pass as the layers need them: which rows of the pool, and how their activations mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.terms import RouteTerms
from lora_hub_sdk.engine.forms import Form, choose_form
from lora_hub_sdk.engine.gate_places import Gating, Places, places_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_hub_sdk.composition.gates import Gate
    from lora_hub_sdk.engine.extras import Extras, Forward
    from lora_hub_sdk.engine.rank_pool import Table


@dataclass(frozen=True)
class RowLora:
    """One row: its route's terms, and the rows of the pool where their ranks lie, R of them.

    ``gate`` is the digest of the gate that its weights come from, where the terms are gated. Where that finds them once
    for a prompt, ``kept`` has them from then on: by the paths of a table (n, k).
    """

    terms: RouteTerms
    ranks: tuple[int, ...]
    gate: str | None = None
    kept: dict[tuple[str, ...], Tensor] | None = field(default=None, compare=False)


class BatchLora:
    """b rows, S ranks of all of them together. Made anew whenever the rows change; its tensors are made when asked for.

    All mixings go by positions: rank s of the batch becomes sum_j ``weights[s, j]`` * h[``partners[s, j]``].

    Args:
        prompt: where prompts are read as a whole, (b, l), which of the tokens are a row's own.
    """

    def __init__(
        self,
        rows: Sequence[RowLora],
        *,
        device: torch.device,
        dtype: torch.dtype,
        gates: Mapping[str, Gate] | None = None,
        prompt: Tensor | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.device, self.dtype = device, dtype
        self.gates = gates or {}
        self.prompt = prompt
        #: The pool's tables that these rows need, once a pass has asked for them.
        self.tables: Mapping[str, tuple[Table, int]] | None = None
        self._routes = list(dict.fromkeys(self.rows))
        self._lookups: dict[int, Lookup] = {}
        self._padded: dict[int, Padded] = {}
        self._affine: dict[str, Affine | None] = {}
        self._saved: dict[str, list[Saved]] = {}
        self._norms: dict[str, dict[str, Tensor]] = {}
        self._places: dict[Form, Places] = {}
        self._kept: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        self._dense: dict[tuple[str, ...], DenseTable] = {}

    @property
    def empty(self) -> bool:
        """Whether no row has any adapter."""
        return not any(row.ranks for row in self.rows)

    def form(self, tokens: int) -> Form:
        """The form of a pass with ``tokens`` of each row."""
        if self.empty:
            return "shared"
        return choose_form(
            on_cpu=self.device.type == "cpu",
            half=self.dtype.itemsize == 2,
            tokens=tokens,
            gated=self.gated,
            routes=len(self._routes),
            looked_up=sum(len(row.ranks) for row in self.rows),
            different=len(self.different),
            widest=max(len(row.ranks) for row in self.rows),
        )

    @cached_property
    def gated(self) -> bool:
        """Whether any row's weights come from a gate."""
        return any(row.terms.gated for row in self.rows)

    @cached_property
    def digests(self) -> frozenset[str]:
        """The contents of all rows' adapters."""
        return frozenset(digest for row in self.rows for digest in row.terms.digests)

    @cached_property
    def different(self) -> tuple[int, ...]:
        """The different ranks of the pool that any row has."""
        return tuple(dict.fromkeys(rank for row in self.rows for rank in row.ranks))

    # -- beside the factors -------------------------------------------------------------------------------------------

    def affine(self, path: str, extras: Mapping[str, Extras], bias: Tensor | None) -> Affine | None:
        """What the rows' outputs of a module are multiplied by and shifted by; None where no row has anything there.

        With the members' weights w: W x + bias becomes W x (1 + sum w (g - 1)) + bias + sum w shift.
        """
        if path not in self._affine:
            gains = self._mixed({digest: one.gains[path] for digest, one in extras.items() if path in one.gains})
            shifts = self._mixed({digest: one.shifts[path] for digest, one in extras.items() if path in one.shifts})
            if gains is not None and bias is not None:
                back = gains * bias.float()
                shifts = -back if shifts is None else shifts - back
            gain, shift = (None if one is None else self._weights(one[:, None]) for one in (gains, shifts))
            self._affine[path] = None if gain is None and shift is None else Affine(gain, shift)
        return self._affine[path]

    def saved(self, path: str, extras: Mapping[str, Extras]) -> list[Saved]:
        """The modules that replace the base's at a path."""
        if path not in self._saved:
            import torch

            shares = {digest: self._shares[digest] for digest, one in extras.items() if path in one.saved}
            self._saved[path] = [
                Saved(extras[digest].saved[path], self.index(list(own)), self._weights(torch.tensor([*own.values()])))
                for digest, own in shares.items()
            ]
        return self._saved[path]

    def norm(self, path: str, extras: Mapping[str, Extras], module: nn.Module) -> dict[str, Tensor]:
        """The parameters of a norm for each row, (b, d) by name.

        A norm's output is linear in them, so the average of its members' outputs has the average of their parameters.
        """
        if path not in self._norms:
            made = {}
            for name, own in module.named_parameters(recurse=False):
                changes = {
                    digest: one.norms[path][name] for digest, one in extras.items() if name in one.norms.get(path, {})
                }
                change = self._mixed(changes)
                plain = own.detach().float().expand(len(self.rows), -1)
                made[name] = (plain if change is None else plain + change).to(own.dtype)
            self._norms[path] = made
        return self._norms[path]

    def _mixed(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """sum over a row's members of w * tensor, (b, d), float32; None where no row has any of them."""
        import torch

        if not tensors:
            return None
        matrix = torch.zeros(len(self.rows), len(tensors))
        for place, digest in enumerate(tensors):
            for row, share in self._shares[digest].items():
                matrix[row, place] = share
        if not bool(matrix.any()):
            return None
        return matrix.to(self.device) @ torch.stack(list(tensors.values()))

    @cached_property
    def _shares(self) -> dict[str, dict[int, float]]:
        """For each adapter the rows that have it, and its weight in each."""
        found: dict[str, dict[int, float]] = {}
        for place, row in enumerate(self.rows):
            for digest, share in zip(row.terms.digests, row.terms.shares, strict=True):
                found.setdefault(digest, {})[place] = share
        return found

    # -- gates --------------------------------------------------------------------------------------------------------

    def places(self, form: Form) -> Places:
        """Where the ranks of a batch with gates lie in a form."""
        if form not in self._places:
            self._places[form] = places_of(self, form)
        return self._places[form]

    def kept(self, gating: Gating, paths: tuple[str, ...], find: Callable[[], Tensor]) -> Tensor:
        """The weights (m, n, k) of rows that have them for their whole prompts.

        Args:
            find: gives them where prompts are being read; a row that has some already keeps its own.
        """
        import torch

        key = (gating.gate, paths)
        if key not in self._kept:
            rows, most = [self.rows[place] for place in gating.places], gating.present.shape[1]
            if self.prompt is None:
                # A row without any has no adapter here, nor had it when its prompt was read.
                found = torch.zeros(len(rows), len(paths), most, dtype=self.dtype, device=self.device)
            else:
                found = find().clone()
            for own, row in zip(found, rows, strict=True):
                if row.kept is not None:
                    mine = own[:, : len(row.terms.digests)]
                    mine.copy_(row.kept.get(paths, mine) if self.prompt is None else row.kept.setdefault(paths, mine))
            self._kept[key] = found
        return self._kept[key]

    # -- shared -------------------------------------------------------------------------------------------------------

    @cached_property
    def shared(self) -> Shared:
        """The one route of all rows."""
        import torch

        row = self.rows[0]
        mixing = torch.zeros(len(row.ranks), len(row.ranks))
        for own, (partners, weights) in enumerate(zip(row.terms.partners, row.terms.weights, strict=True)):
            mixing[own, list(partners)] = torch.tensor(weights)
        diagonal = all(len(partners) == 1 for partners in row.terms.partners)
        return Shared(self._weights(mixing.diagonal() if diagonal else mixing.t()), diagonal)

    # -- lookup -------------------------------------------------------------------------------------------------------

    def lookup(self, members: int) -> Lookup:
        """Indices into a table of ``members`` modules side by side."""
        if members not in self._lookups:
            import torch

            flat, starts, owners = self._flat
            each = torch.arange(members, device=self.device)[:, None]
            self._lookups[members] = Lookup(
                (flat * members + each).reshape(-1),
                (starts + each * len(flat)).reshape(-1),
                owners.repeat(members),
            )
        return self._lookups[members]

    @cached_property
    def partners(self) -> Tensor | None:
        """(S, J) positions among the S ranks, or None where each rank mixes with itself alone."""
        if all(len(partners) == 1 for row in self.rows for partners in row.terms.partners):
            return None
        import torch

        width = max(len(partners) for row in self.rows for partners in row.terms.partners)
        found, start = [], 0
        for row in self.rows:
            for partners in row.terms.partners:
                found += [[start + one for one in partners] + [start] * (width - len(partners))]
            start += len(row.ranks)
        return torch.tensor(found, device=self.device)

    @cached_property
    def weights(self) -> Tensor:
        """(S, J), or (S) where J is 1."""
        import torch

        width = max((len(weights) for row in self.rows for weights in row.terms.weights), default=1)
        found = [[*weights, *[0.0] * (width - len(weights))] for row in self.rows for weights in row.terms.weights]
        table = self._weights(torch.tensor(found))
        return table[:, 0] if width == 1 else table

    def mix_(self, hidden: Tensor) -> Tensor:
        """hidden (..., S) -> (..., S), in place where that is possible."""
        if self.partners is None:
            return hidden.mul_(self.weights)
        return (hidden[..., self.partners] * self.weights).sum(-1)

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """The S pool rows; where each batch row's begin; to which batch row each belongs."""
        import torch

        sizes = [len(row.ranks) for row in self.rows]
        owners = [place for place, size in enumerate(sizes) for _ in range(size)]
        starts = list(accumulate(sizes, initial=0))[:-1]
        return (
            self.index([rank for row in self.rows for rank in row.ranks]),
            torch.tensor(starts, device=self.device),
            torch.tensor(owners, dtype=torch.long, device=self.device),
        )

    # -- gather -------------------------------------------------------------------------------------------------------

    def padded(self, members: int) -> Padded:
        """The rows' ranks side by side, filled up with the pool's row of zeros."""
        if members not in self._padded:
            import torch

            ranks, partners, weights = self._padding
            each = torch.arange(members, device=self.device)[:, None]
            alone = partners.shape[-1] == 1
            self._padded[members] = Padded(
                (ranks[:, None] * members + each).reshape(-1),
                None if alone else partners,
                weights.view(len(ranks), 1, -1).repeat(1, 1, members) if alone else weights,
            )
        return self._padded[members]

    @cached_property
    def _padding(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks (b, R), partners (b, R, J) by their place in the row, and weights (b, R, J)."""
        import torch

        width = max(len(row.ranks) for row in self.rows)
        depth = max((len(one) for row in self.rows for one in row.terms.partners), default=1)
        ranks, partners, weights = [], [], []
        for row in self.rows:
            missing = width - len(row.ranks)
            ranks.append([*row.ranks, *[0] * missing])
            partners.append([[*one, *[0] * (depth - len(one))] for one in (*row.terms.partners, *[()] * missing)])
            weights.append([[*one, *[0.0] * (depth - len(one))] for one in (*row.terms.weights, *[()] * missing)])
        return self.index(ranks), torch.tensor(partners, device=self.device), self._weights(torch.tensor(weights))

    # -- dense --------------------------------------------------------------------------------------------------------

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """For each of the S ranks its batch row, and its place among ``different``."""
        place = {rank: at for at, rank in enumerate(self.different)}
        return self._flat[2], self.index([place[rank] for row in self.rows for rank in row.ranks])

    @cached_property
    def matrix(self) -> Tensor:
        """The mapping matrix M by ranks, (b, T), for rows that mix nothing (paper section 4.3)."""
        import torch

        matrix = torch.zeros(len(self.rows), len(self.different), dtype=self.dtype, device=self.device)
        matrix[self.positions] = self.weights
        return matrix

    def dense(self, table: Table) -> DenseTable:
        """The T different ranks of a table, copied side by side once a batch."""
        if table.paths not in self._dense:
            index = self.index(self.different)
            self._dense[table.paths] = DenseTable(
                table.a[index].transpose(0, 1).reshape(-1, table.a.shape[-1]),
                [one for tensor in table.b for one in tensor[index].transpose(0, 1).contiguous()],
            )
        return self._dense[table.paths]

    def index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Whole numbers on the batch's device."""
        import torch

        return torch.tensor(values, dtype=torch.long, device=self.device)

    def numbers(self, values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """Numbers on the batch's device, in its dtype."""
        import torch

        return self._weights(torch.tensor(values))

    def _weights(self, values: Tensor) -> Tensor:
        return values.to(self.device, self.dtype)


@dataclass(frozen=True)
class Affine:
    """``gain`` less 1 and ``shift``, (b, 1, d_out); None for none at all."""

    gain: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class Saved:
    """An adapter's own module, the rows (m,) that have it, and its weights there (m,)."""

    forward: Forward
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Shared:
    """``mixing`` (R,) where ``diagonal``, else (R, R) for h @ mixing."""

    mixing: Tensor
    diagonal: bool


@dataclass(frozen=True)
class Lookup:
    """``index`` and ``owners`` (members * S,), ``offsets`` (members * b,)."""

    index: Tensor
    offsets: Tensor
    owners: Tensor


@dataclass(frozen=True)
class Padded:
    """``index`` (b * members * R,); ``partners`` and ``weights`` (b, R, J), or None and (b, 1, members * R)."""

    index: Tensor
    partners: Tensor | None
    weights: Tensor


@dataclass(frozen=True)
class DenseTable:
    """``a`` (n * T, d_in); for each module ``b`` (T, d_out)."""

    a: Tensor
    b: list[Tensor]
