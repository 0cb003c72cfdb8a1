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
        self._active: Mapping[str, RowLora] = {}

    @contextmanager
    def apply(self, batch: ComposedBatch) -> Iterator[None]:
        """Within the block every forward pass has ``batch.rows`` rows, each with its own composition."""
        self._active = batch.modules
        with ExitStack() as undo:
            undo.callback(self.narrow, ComposedBatch(0, {}))
            for path in batch.modules:
                undo.callback(self._modules[path].register_forward_hook(self._hook(path)).remove)
            yield

    def narrow(self, batch: ComposedBatch) -> None:
        """Go on with fewer rows inside the block: the same modules, some rows gone."""
        self._active = batch.modules

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add_delta(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return with_delta(inputs[0], output, self._active[path])

        return add_delta


def with_delta(x: Tensor, output: Tensor, lora: RowLora) -> Tensor:
    """output + (x A^T) B^T row by row: x (b, l, d_in), output (b, l, d_out) -> (b, l, d_out)."""
    import torch
    from torch.nn.functional import linear

    if lora.a.shape[0] == 1:
        return output + linear(linear(x.to(lora.a.dtype), lora.a[0]), lora.b[0]).to(output.dtype)
    hidden = torch.bmm(x.to(lora.a.dtype), lora.a.transpose(1, 2))
    return torch.baddbmm(output, hidden.to(output.dtype), lora.b.transpose(1, 2).to(output.dtype))
