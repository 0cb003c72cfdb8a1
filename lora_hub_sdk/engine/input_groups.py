"""Which linear modules of a model are given the same input: q, k and v; gate and up. Found by running it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Groups = list[tuple[str, ...]]


def input_groups(model: nn.Module, paths: Sequence[str]) -> Groups:
    """The modules at ``paths`` by the tensor that they read, in the order of their calls.

    One token goes through the model. A module that it does not reach, or reaches twice, stands by itself. Wider outputs
    come first within a group, and equally wide ones side by side, so that they can share a product.
    """
    import torch

    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    seen: list[tuple[str, Tensor, int]] = []  # the tensors are kept, so that no two of them get the same identity

    def note(path: str, inputs: Tensor, output: Tensor) -> None:
        seen.append((path, inputs, output.shape[-1]))

    with ExitStack() as undo, torch.inference_mode():
        for path in paths:
            hook = _noting(path, note)
            undo.callback(modules[path].register_forward_hook(hook).remove)
        anything: Any = model
        # Without a mask, a model whose padding is the token 0 warns.
        one = torch.zeros((1, 1), dtype=torch.long, device=anything.device)
        anything(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False)
    calls = [path for path, _, _ in seen]
    groups: dict[int | str, dict[str, int]] = {}
    for path, inputs, width in seen:
        groups.setdefault(id(inputs) if calls.count(path) == 1 else path, {})[path] = width
    found = [tuple(sorted(group, key=lambda path: -group[path])) for group in groups.values()]
    return found + [(path,) for path in paths if path not in set(calls)]


def _noting(path: str, note: Any) -> Any:
    return lambda _module, inputs, output: note(path, inputs[0], output)
