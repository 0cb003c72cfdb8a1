"""The place where adapters touch the base model: each row's own delta, added to its linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.engine.batch_lora import BatchLora
from lora_hub_sdk.engine.extras import Extras, norm_by_row
from lora_hub_sdk.engine.forms import Form
from lora_hub_sdk.engine.gating import weigh_looked_up, weigh_side_by_side
from lora_hub_sdk.engine.linear import Product
from lora_hub_sdk.engine.rank_pool import RankPool, Table
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Adds the delta of the module of that place in its table to an output (b, l, d_out), in place.
Add = Callable[[int, "Tensor"], None]


class LoraLayers:
    """Takes over the forward of a model's modules, for exactly as long as one pass of a batch.

    The base weights are never written. On every way out of ``with layers.apply(batch)`` the model is as it came: PEFT's
    hooks outlive an exception and give the next caller the failed call's adapter. Not thread-safe: whoever owns the
    model serialises its passes.

    Args:
        products: the linear modules of the model by path, and how each computes its own product.
        embedding: the path of the input embedding.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        products: Mapping[str, Product],
        pool: RankPool,
        *,
        embedding: str | None = None,
    ) -> None:
        self._pool, self._modules = pool, modules
        # Apart from this object, which its forwards must not keep: a model in a cycle stays until a collection.
        self._turn = _Turn()
        self._biases: dict[str, Any] = {path: getattr(modules[path], "bias", None) for path in products}
        self._forwards = [(modules[path], _linear(path, product, self._turn)) for path, product in products.items()]
        if embedding is not None:
            self._forwards.append((modules[embedding], _embedding(embedding, modules[embedding], self._turn)))

    @contextmanager
    def apply(self, batch: BatchLora, tokens: int) -> Iterator[None]:
        """Within the block a forward pass has the rows of ``batch``, each of ``tokens`` tokens."""
        if batch.tables is None:
            batch.tables = {} if batch.empty else self._pool.members_of(batch.digests)
        extras = {digest: one for digest, one in self._pool.extras.items() if digest in batch.digests}
        self._turn.now = _Pass(batch, batch.tables, tokens, extras, self._biases)
        norms = {path for one in extras.values() for path in one.norms}
        forwards = [
            *self._forwards,
            *((self._modules[path], _norm(path, self._modules[path], self._turn)) for path in norms),
        ]
        try:
            for module, forward in forwards:
                module.__dict__["forward"] = forward
            yield
        finally:
            for module, _ in forwards:
                module.__dict__.pop("forward", None)
            self._turn.now = None


@dataclass(slots=True)
class _Turn:
    """The pass that is going on."""

    now: _Pass | None = None


def _linear(path: str, product: Product, turn: _Turn) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        assert turn.now is not None, "only a pass calls it"
        output = product(x)
        turn.now.add_(path, x, output)
        return output

    return forward


def _embedding(path: str, module: nn.Module, turn: _Turn) -> Callable[[Tensor], Tensor]:
    own = module.forward
    # Gemma's multiplies what it looks up.
    scale: Any = getattr(module, "embed_scale", None)

    def forward(ids: Tensor) -> Tensor:
        assert turn.now is not None, "only a pass calls it"
        output: Tensor = own(ids)
        turn.now.embed_(path, ids, output, scale)
        return output

    return forward


def _norm(path: str, module: nn.Module, turn: _Turn) -> Callable[[Tensor], Tensor]:
    """Of a norm that some adapter replaces: one pass with each row's own parameters."""

    def forward(x: Tensor) -> Tensor:
        assert turn.now is not None, "only a pass calls it"
        return turn.now.normed(path, x, module)

    return forward


class _Pass:
    """One forward pass. What modules with the same input share is computed at the first of them."""

    def __init__(
        self,
        batch: BatchLora,
        tables: Mapping[str, tuple[Table, int]],
        tokens: int,
        extras: Mapping[str, Extras],
        biases: Mapping[str, Any],
    ) -> None:
        self._batch, self._tables, self._tokens = batch, tables, tokens
        self._extras, self._biases = extras, biases
        self._prepare = _FORMS[batch.form(tokens)]
        self._input: Tensor | None = None
        self._table: Table | None = None
        self._add: Add | None = None

    def add_(self, path: str, x: Tensor, output: Tensor) -> None:
        """Add the delta of each row to the output of a linear module, in place; nothing where no adapter has it."""
        if self._extras:
            self.adjust_(path, x, output)
        found = self._tables.get(path)
        if found is None:
            return
        table, member = found
        if self._add is None or x is not self._input or table is not self._table:
            self._input, self._table = x, table
            self._add = self._prepare(self._by_row(path, x).to(self._batch.dtype), table, self._batch)
        self._add(member, self._by_row(path, output))

    def embed_(self, path: str, ids: Tensor, output: Tensor, scale: Tensor | float | None) -> None:
        """As ``add_``, to the output of the embedding, of ids (b, l)."""
        if self._extras:
            self.adjust_(path, ids, output)
        found = self._tables.get(path)
        if found is not None:
            table, _ = found
            delta = _embedded(ids, table, self._batch)
            output.add_(delta if scale is None else delta * scale)

    def adjust_(self, path: str, x: Tensor, output: Tensor) -> None:
        """Give each row's output what its adapters have there beside factors, in place."""
        replaced = self._batch.saved(path, self._extras)
        affine = self._batch.affine(path, self._extras, self._biases.get(path))
        if not replaced and affine is None:
            return
        rows = self._by_row(path, output) if output.dim() == 2 else output
        if replaced and x.is_floating_point() and x.dim() == 2:
            x = self._by_row(path, x)
        # From the base's own output all of them, before it changes.
        deltas = [(one, (one.forward(x[one.rows]) - rows[one.rows])) for one in replaced]
        if affine is not None and affine.gain is not None:
            rows.addcmul_(rows, affine.gain)
        if affine is not None and affine.shift is not None:
            rows.add_(affine.shift)
        for one, delta in deltas:
            rows.index_add_(0, one.rows, delta * one.weights.view(-1, *[1] * (rows.dim() - 1)).to(delta.dtype))

    def normed(self, path: str, x: Tensor, module: nn.Module) -> Tensor:
        """What a norm gives each row of x (b, ..., d), with the parameters that the row's adapters make of it."""
        parameters = self._batch.norm(path, self._extras, module)
        rows = self._by_row(path, x) if x.dim() == 2 else x
        return norm_by_row(module, parameters, rows).view(x.shape)

    def _by_row(self, path: str, x: Tensor) -> Tensor:
        """(b, l, d), also where a model passes (b * l, d) as OPT does."""
        if x.dim() == 3:
            return x
        if len(x) != len(self._batch.rows) * self._tokens:
            raise ConfigurationError(f"{path!r} is given some tokens only, as a routed expert: no adapter can go there")
        return x.view(-1, self._tokens, x.shape[-1])


def _shared(x: Tensor, table: Table, batch: BatchLora) -> Add:
    """All rows have one route of T ranks: two plain products for any number of tokens."""
    from torch.nn.functional import linear

    factors, route = batch.dense(table), batch.shared
    flat = x.reshape(-1, x.shape[-1])
    hidden = linear(flat, factors.a).view(len(flat), len(table.paths), -1)
    hidden = hidden.mul_(route.mixing) if route.diagonal else hidden @ route.mixing

    return lambda member, output: _add_product(output, hidden[:, member], factors.b[member])


def _lookup(x: Tensor, table: Table, batch: BatchLora) -> Add:
    """One token a row. Each row's ranks are looked up where they lie, so nothing is copied."""
    import torch

    members = len(table.paths)
    at = batch.lookup(members)
    # The gradient of embedding_bag's weights is what A needs: the inner product of each looked up row with its x.
    products: Any = torch.ops.aten._embedding_bag_per_sample_weights_backward.default
    width = x.shape[-1]
    hidden: Tensor = products(x.reshape(-1, width), table.a.view(-1, width), at.index, at.offsets, at.owners, 0, -1)
    hidden = hidden.view(members, -1)
    hidden = weigh_looked_up(hidden, x, table, batch) if batch.gated else batch.mix_(hidden)
    done: dict[int, Tensor] = {}

    def add(member: int, output: Tensor) -> None:
        first, last, b = table.run_of(member)
        if first not in done:
            index = batch.lookup(last - first)
            # As functional.embedding_bag, without its checks at each of some hundred calls a step.
            done[first] = torch.embedding_bag(
                b.view(-1, b.shape[-1]),
                index.index,
                index.offsets,
                False,
                0,
                False,
                hidden[first:last].view(-1),
                False,
                None,
            )[0].view(last - first, *output.shape)
        output.add_(done[first][member - first])

    return add


def _dense(x: Tensor, table: Table, batch: BatchLora) -> Add:
    """All T different ranks of the batch on every row, then the mapping matrix M by ranks.

    One token a row, or any number where rows have gates, and so a matrix for each token.
    """
    from torch.nn.functional import linear

    factors = batch.dense(table)
    flat = x.reshape(-1, x.shape[-1])
    hidden = linear(flat, factors.a).view(len(flat), len(table.paths), -1)
    if batch.gated:
        apart = hidden.view(*x.shape[:2], *hidden.shape[1:])
        hidden = weigh_side_by_side(apart, x, table, batch, "dense").view(hidden.shape)
    elif batch.partners is None:
        hidden = hidden.mul_(batch.matrix[:, None])
    else:
        rows, places = batch.positions
        mixed = batch.mix_(hidden[rows, :, places].t()).t()
        hidden = hidden.new_zeros(hidden.shape)
        hidden[rows, :, places] = mixed

    return lambda member, output: _add_product(output, hidden[:, member], factors.b[member])


def _gather(x: Tensor, table: Table, batch: BatchLora) -> Add:
    """Each row's own factors side by side, for this table only, and products row by row."""
    import torch

    members, width, rows = len(table.paths), x.shape[-1], len(batch.rows)
    a = table.a.view(-1, width).index_select(0, batch.padded(members).index).view(rows, -1, width)
    hidden = _mixed(torch.bmm(x, a.transpose(1, 2)), x, table, batch)
    ranks = hidden.shape[-1] // members

    def add(member: int, output: Tensor) -> None:
        first, last, b = table.run_of(member)
        index = batch.padded(last - first).index.view(rows, last - first, ranks)[:, member - first].reshape(-1)
        factors = b.view(-1, b.shape[-1]).index_select(0, index).view(rows, ranks, -1)
        mine = hidden[..., member * ranks : (member + 1) * ranks]
        if output.dtype == factors.dtype:
            output.baddbmm_(mine, factors)
        else:
            output.add_(torch.bmm(mine, factors))

    return add


def _mixed(hidden: Tensor, x: Tensor | None, table: Table, batch: BatchLora) -> Tensor:
    """The activations of padded ranks (b, l, n * R) as each row's route mixes them. May be done in place."""
    members = len(table.paths)
    padded = batch.padded(members)
    apart = hidden.view(*hidden.shape[:2], members, -1)
    if batch.gated:
        return weigh_side_by_side(apart, x, table, batch, "gather").view(hidden.shape)
    if padded.partners is None:
        return hidden.mul_(padded.weights)
    # (b, l, n, R, J): each rank's partners within its own module.
    places = padded.partners[:, None, None].expand(*apart.shape[:3], *padded.partners.shape[1:])
    found = apart[..., None, :].expand(*places.shape[:4], -1).gather(-1, places)
    return (found * padded.weights[:, None, None]).sum(-1).view(hidden.shape)


def _embedded(ids: Tensor, table: Table, batch: BatchLora) -> Tensor:
    """The delta of an embedding, (b, l, d). What A times a one-hot vector is, is looked up."""
    import torch

    rows, (_, _, b) = len(batch.rows), table.run_of(0)
    index = batch.padded(1).index.view(rows, 1, -1)
    hidden = _mixed(table.a[index, 0, ids[:, :, None]], None, table, batch)
    return torch.bmm(hidden, b[index.view(rows, -1), 0])


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> None:
    """output (..., d) += left (n, R) @ right (R, d), in place."""
    flat = output.view(-1, output.shape[-1])
    if output.dtype == right.dtype:
        flat.addmm_(left, right)
    else:
        flat.add_(left @ right)


_FORMS: Final[dict[Form, Callable[[Tensor, Table, BatchLora], Add]]] = {
    "shared": _shared,
    "lookup": _lookup,
    "dense": _dense,
    "gather": _gather,
}
