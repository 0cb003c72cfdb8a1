"""How many bytes of tensors live at each moment of a model's forward passes; imports torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_hub_sdk.engine.base_model import BaseModel


def live_bytes(base: BaseModel, run: Callable[[], object]) -> list[int]:
    """The most bytes that tensors took between each call of a linear layer and the next, while ``run`` ran.

    Counted are tensors made within the model's forward passes, in whichever thread, for as long as they live; the
    scratch memory of a single kernel is not seen. Runs that pass through the model alike compare place by place.
    """
    counting = _Counting()
    model: Any = base.model
    with ExitStack() as undo:
        # Modes belong to threads, and an engine's model runs in a thread of its own.
        undo.callback(model.register_forward_pre_hook(counting.begin).remove)
        undo.callback(model.register_forward_hook(counting.end, always_call=True).remove)
        for path in base.shapes:
            undo.callback(base.modules[path].register_forward_pre_hook(counting.mark).remove)
        run()
    return counting.peaks


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = 0
        self._known: set[int] = set()
        self.peaks: list[int] = []

    def begin(self, *_: object) -> None:
        self.mark()
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: object) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def mark(self, *_: object) -> None:
        self.peaks.append(self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            address = _address(tensor)
            if address and address not in given and address not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(address)
                self._live += storage.nbytes()
                self.peaks[-1] = max(self.peaks[-1], self._live)
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        return result

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._live -= size


def _tensors(tree: Any) -> list[Tensor]:
    # Packed weights of oneDNN have no storage that can be asked for.
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
