"""The place where adapters touch the base model: forward hooks that live exactly as long as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.composition.compose import ComposedBatch, RowLora

if TYPE_CHECKING:
    from torch import Tensor, nn


class LoraLayers:
    """Adds each row's own delta to the linear modules of a shared base model.

    The base weights are never written. Hooks exist only inside ``with layers.apply(batch)``, and are removed on every
    way out of it: PEFT's hooks outlive an exception and give the next caller the failed call's adapter. Not
    thread-safe: whoever owns the model serialises its batches.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._active = ComposedBatch({})

    @contextmanager
    def apply(self, batch: ComposedBatch) -> Iterator[None]:
        """Within the block every forward pass has the rows of ``batch``, each with its own composition."""
        self._active = batch
        with ExitStack() as undo:
            undo.callback(setattr, self, "_active", ComposedBatch({}))
            for path in batch.modules:
                undo.callback(self._modules[path].register_forward_hook(self._hook(path)).remove)
            yield

    def start_decoding(self) -> None:
        """From here on every row is one token long."""
        self._active = self._active.for_decoding()

    def narrow(self, keep: Tensor) -> None:
        """Go on with only the rows at the indices ``keep``."""
        self._active = self._active.select(keep)

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add_delta(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return add_delta_(output, inputs[0], self._active.modules[path])

        return add_delta


def add_delta_(output: Tensor, x: Tensor, lora: RowLora) -> Tensor:
    """output += (x A^T) B^T row by row, in place: x (b, l, d_in), output (b, l, d_out)."""
    import torch
    from torch.nn.functional import linear

    x = x.to(lora.a.dtype)
    if lora.a.shape[0] == 1:
        return output.add_(linear(linear(x, lora.a[0]), lora.b[0]))
    hidden = torch.bmm(x, lora.a.transpose(1, 2))
    columns = lora.b.transpose(1, 2)
    if output.dtype == columns.dtype:
        return output.baddbmm_(hidden, columns)
    return output.add_(torch.bmm(hidden, columns))
