"""The keys and values of all rows that decode together: one rectangle, which rows join and leave.

Rows are aligned at their last token, so that a step writes one column for all of them, a new row is copied in to end
where the others end, and distances between tokens are right for sliding windows too. A row that is shorter than the
longest has masked places before it. Steps move the column to the right; once the buffer ends, what is still needed is
moved back to its front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Columns are allocated so many at a time, and rows to the next power of two.
_COLUMNS: Final = 64
#: An idle engine keeps a buffer of this size for its next batch, and gives larger ones back.
_IDLE_BYTES: Final = 256 << 20


class _Window:
    """The part of the buffers in use, the same in all layers: ``rows`` from the first, columns ``start`` to ``end``."""

    def __init__(self) -> None:
        self.rows = self.start = self.end = 0


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's buffers (rows, heads, columns, d), written in place."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window = window
        self.keys: Tensor | None
        self.values: Tensor | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        rows, start, end = self._window.rows, self._window.start, self._window.end
        after = end + key_states.shape[2]
        self.keys[:rows, :, end:after] = key_states
        self.values[:rows, :, end:after] = value_states
        return self.keys[:rows, :, start:after], self.values[:rows, :, start:after]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._window.end - self._window.start

    def get_max_length(self) -> int:
        return -1


class RowsCache:
    """See the module. ``cache`` is what the model is given for a step."""

    def __init__(self, layers: int) -> None:
        self._window = _Window()
        self._layers = [_Layer(self._window) for _ in range(layers)]
        self._starts: list[int] = []  # the first column of each row
        self._shape = (0, 0)
        self.cache: Any = Cache(layers=[*self._layers])

    @property
    def width(self) -> int:
        """Columns in use, masked ones included."""
        return self._window.end - self._window.start

    @property
    def size_bytes(self) -> int:
        """What the buffers take."""
        return sum(tensor.numel() * tensor.element_size() for layer in self._layers for tensor in _tensors(layer))

    def join(self, prefilled: Any, lengths: Sequence[int]) -> None:
        """Let rows in behind those that are there.

        Args:
            prefilled: a cache of their left-padded prompts, layers of (rows, heads, width, d).
            lengths: how many tokens of each are its own.
        """
        window, first, width = self._window, self._window.rows, max(lengths)
        if first + len(lengths) > self._shape[0] or width > window.end:
            self._move(first + len(lengths), max(width, self.width), prefilled)
        for layer, source in zip(self._layers, prefilled.layers, strict=True):
            for tensor, new in zip(_tensors(layer), (source.keys, source.values), strict=True):
                place = tensor[first : first + len(lengths), :, window.end - width : window.end]
                place.copy_(new[:, :, new.shape[2] - width :])
        window.rows += len(lengths)
        self._starts += [window.end - length for length in lengths]
        window.start = min(self._starts)

    def drop(self, places: Sequence[int]) -> None:
        """Take rows out; for each of them, from the last to the first, the then last row moves to its place."""
        window = self._window
        for place in sorted(places, reverse=True):
            last = window.rows = window.rows - 1
            self._starts[place] = self._starts[last]
            self._starts.pop()
            for layer in self._layers:
                for tensor in _tensors(layer):
                    if place != last:
                        tensor[place] = tensor[last]
                    # What is masked still is multiplied, by zero: a number that is none would spread to the next row.
                    tensor[last].zero_()
        window.start = min(self._starts, default=window.end)
        if not self._starts:
            window.start = window.end = 0
            if self.size_bytes > _IDLE_BYTES:
                self._free()

    def reserve_column(self) -> None:
        """Room for one more token of every row."""
        if self._window.end == self._shape[1]:
            self._move(self._window.rows, self.width, None)

    def advance(self) -> None:
        """The forward pass wrote that token."""
        self._window.end += 1

    def clear(self) -> None:
        """Forget all rows, as after a failed pass."""
        self.drop(range(self._window.rows))

    def mask(self, device: torch.device) -> Tensor:
        """(rows, width + 1), True where a row's own tokens are, the one about to come included."""
        import torch

        starts = torch.tensor(self._starts, device=device)[:, None] - self._window.start
        return torch.arange(self.width + 1, device=device) >= starts

    def _move(self, rows: int, end: int, prefilled: Any) -> None:
        """Make the window end at column ``end``, in buffers with room for these rows and at least one column more."""
        window, (held_rows, held_columns) = self._window, self._shape
        keep = slice(window.start, window.end)
        target = slice(end - self.width, end)
        fits = rows <= held_rows and end < held_columns
        if not fits:
            more = max(end + 1, held_columns * 5 // 4) if end >= held_columns else held_columns
            self._shape = (max(held_rows, 1 << (rows - 1).bit_length()), -(-more // _COLUMNS) * _COLUMNS)
        for place, layer in enumerate(self._layers):
            held = _tensors(layer)
            like = held or [prefilled.layers[place].keys, prefilled.layers[place].values]
            moved = []
            for tensor in like:
                fresh = (
                    tensor
                    if fits
                    else tensor.new_zeros(self._shape[0], tensor.shape[1], self._shape[1], tensor.shape[3])
                )
                if held and window.rows:
                    fresh[: window.rows, :, target] = tensor[: window.rows, :, keep].clone()
                moved.append(fresh)
            layer.keys, layer.values = moved
        by = end - window.end
        self._starts = [start + by for start in self._starts]
        window.start, window.end = target.start, end

    def _free(self) -> None:
        for layer in self._layers:
            layer.keys = layer.values = None
        self._shape = (0, 0)


def _tensors(layer: _Layer) -> list[Tensor]:
    return [] if layer.keys is None or layer.values is None else [layer.keys, layer.values]
