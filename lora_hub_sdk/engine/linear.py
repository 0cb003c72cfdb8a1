"""The base model's own linear products, by the quickest kernel that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Packed weights lie in memory beside the plain ones, so only models whose linear weights are smaller are packed.
PACKED_BYTES: Final = 2 << 30
#: Up to so many rows, their number is a multiple of this.
_STEPS: Final = ((16, 1), (64, 8), (128, 16), (1024, 64), (1 << 62, 256))


#: x (..., d_in) -> (..., d_out) of one linear module, bias and all.
Product = Callable[["Tensor"], "Tensor"]


def linear_products(modules: Mapping[str, nn.Module], *, packed_bytes: int = PACKED_BYTES) -> dict[str, Product]:
    """The product of each linear module, by its path.

    On a CPU, plain linears go through oneDNN, with weights packed once: torch's own float32 product takes 2 to 3 times
    as long on processors for which MKL has no quick path, its bfloat16 one 1.6 times. Anything else (quantized,
    ``Conv1D``, on a GPU) keeps its own forward.
    """
    import torch

    plain = {path for path, module in modules.items() if _is_plain(module)}
    pack = sum(_bytes(modules[path]) for path in plain) <= packed_bytes
    with torch.inference_mode():
        return {path: _onednn(module, pack) if path in plain else _own(module) for path, module in modules.items()}


def _is_plain(module: nn.Module) -> bool:
    import torch
    from torch import nn

    onednn: Any = torch.backends.mkldnn  # untyped
    if type(module) is not nn.Linear or module.weight.device.type != "cpu":
        return False
    if not (onednn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if module.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return module.weight.dtype == torch.float32


def _bytes(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.numel() * weight.element_size())


def _own(module: nn.Module) -> Product:
    forward: Product = module.forward  # what it was before a pass took it over
    return forward


def _onednn(module: nn.Module, pack: bool) -> Product:
    import torch
    from torch.nn.functional import pad

    ops: Any = torch.ops.mkldnn
    linear: Any = module
    weight, bias = linear.weight.detach(), linear.bias
    if pack:
        weight = ops._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        # Contiguous, because a slice over the last positions would have the weights expanded once a row.
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        rows = len(flat)
        padded = padded_rows(rows)
        if padded > rows:
            flat = pad(flat, (0, 0, 0, padded - rows))
        result: Tensor = ops._linear_pointwise(flat, weight, bias, "none", [], "")
        return result[:rows].view(*x.shape[:-1], -1)

    return product


def padded_rows(rows: int) -> int:
    """The number of rows that a product of so many is computed with. Pure.

    oneDNN compiles a kernel for each number of rows and shape of weights, and keeps it: a millisecond and up to a
    megabyte each. So there are not many different ones.
    """
    step = next((step for limit, step in _STEPS if rows <= limit), _STEPS[-1][1])
    return -(-rows // step) * step
