"""The base model's own linear products, by the quickest kernel that this machine has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

from lora_hub_sdk.engine.base_weights import is_quantized, stored_weight

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Packed weights lie in memory beside the plain ones, so only models whose linear weights are smaller are packed.
PACKED_BYTES: Final = 2 << 30
#: Up to so many rows, their number is a multiple of this.
_STEPS: Final = ((16, 1), (64, 8), (128, 16), (1024, 64), (1 << 62, 256))
#: Up to so many rows torch's product by 8-bit weights is quicker than one by weights made wide for the occasion.
_FEW_ROWS: Final = 32
#: bitsandbytes' own product by 4-bit weights takes rows of weights by so many.
_BLOCK: Final = 32


#: x (..., d_in) -> (..., d_out) of one linear module, bias and all.
Product = Callable[["Tensor"], "Tensor"]


def linear_products(modules: Mapping[str, nn.Module], *, packed_bytes: int = PACKED_BYTES) -> dict[str, Product]:
    """The product of each linear module, by its path.

    On a CPU, plain linears go through oneDNN, with weights packed once: torch's own float32 product takes 2 to 3 times
    as long on processors for which MKL has no quick path, its bfloat16 one 1.6 times.

    Weights that bitsandbytes has quantized are multiplied as the numbers that they stand for; inputs are not quantized.
    So a quantized base is a plain one with rounded weights, and each row is what it is alone: LLM.int8 itself rounds
    inputs too, and chooses the columns that it spares by all rows of a batch together.

    Anything else keeps its own forward.
    """
    import torch

    packed = packed_paths(modules, packed_bytes=packed_bytes)
    with torch.inference_mode():
        return {path: _product(module, path in packed) for path, module in modules.items()}


def packed_paths(modules: Mapping[str, nn.Module], *, packed_bytes: int = PACKED_BYTES) -> dict[str, int]:
    """The modules whose weights are packed, and the bytes that their copies take. Nothing is packed yet."""
    sizes = {path: _packed_size(module) for path, module in modules.items()}
    return {path: size for path, size in sizes.items() if size} if sum(sizes.values()) <= packed_bytes else {}


@contextmanager
def using(modules: Mapping[str, nn.Module], products: Mapping[str, Product]) -> Iterator[None]:
    """Within the block these modules compute by these products."""
    try:
        for path, product in products.items():
            modules[path].__dict__["forward"] = product
        yield
    finally:
        for path in products:
            modules[path].__dict__.pop("forward", None)


def _is_plain(module: nn.Module) -> bool:
    from torch import nn

    weight: Any = module.weight
    return type(module) is nn.Linear and weight.device.type == "cpu" and _has_onednn(weight.dtype)


def _has_onednn(dtype: Any) -> bool:
    import torch

    onednn: Any = torch.backends.mkldnn  # untyped
    if not (onednn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(dtype == torch.float32)


def _packed_size(module: nn.Module) -> int:
    weight: Any = module.weight
    if _is_plain(module):
        return int(weight.numel() * weight.element_size())
    if _has_four_bits(module) and _has_four_bit_kernel(weight):
        return int(weight.numel() + 2 * weight.quant_state.absmax.numel())
    return 0


def _product(module: nn.Module, pack: bool) -> Product:
    if _has_four_bits(module):
        return _packed_four_bits(module) if pack else _four_bits(module)
    if is_quantized(module):
        return _eight_bits(module)
    if _is_plain(module):
        return _onednn(module, pack)
    forward: Product = module.forward  # what it was before a pass took it over
    return forward


def _onednn(module: nn.Module, pack: bool) -> Product:
    import torch

    ops: Any = torch.ops.mkldnn
    linear: Any = module
    weight, bias = linear.weight.detach(), linear.bias
    if pack:
        weight = ops._reorder_linear_weight(weight, None)
    return _by_onednn(weight, bias)


def _by_onednn(weight: Tensor, bias: Tensor | None) -> Product:
    import torch
    from torch.nn.functional import pad

    ops: Any = torch.ops.mkldnn

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


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., d_in) by weights (d_out, d_in) that were made for this product alone."""
    from torch.nn.functional import linear

    weight = weight.to(x.dtype)
    if x.device.type == "cpu" and _has_onednn(x.dtype):
        return _by_onednn(weight, bias)(x)
    return linear(x, weight, bias)


def _eight_bits(module: nn.Module) -> Product:
    import torch

    own: Any = module
    largest = own.weight.SCB if own.state.SCB is None else own.state.SCB  # the library moves it in its own forward
    weight, scale, bias = own.weight.data, largest / 127, own.bias
    few: Any = getattr(torch, "_weight_int8pack_mm", None) if weight.device.type == "cpu" else None
    ones = torch.ones(len(scale), dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # sums of whole numbers would leave its range
            return _times(x, weight.half() * scale.half()[:, None], bias)
        if few is not None and x.dtype == torch.bfloat16 and x.numel() <= _FEW_ROWS * x.shape[-1]:
            whole = few(x.reshape(-1, x.shape[-1]).contiguous(), weight, ones).view(*x.shape[:-1], -1)
        else:
            whole = _times(x, weight, None)
        result: Tensor = (whole * scale).to(x.dtype)
        return result if bias is None else result + bias

    return product


def _four_bits(module: nn.Module) -> Product:
    own: Any = module
    weight, state, bias = own.weight.data, own.weight.quant_state, own.bias
    if weight.device.type == "cpu":
        return lambda x: _times(x, stored_weight(module), bias)
    import bitsandbytes

    library: Any = bitsandbytes
    return lambda x: cast("Tensor", library.matmul_4bit(x, weight, quant_state=state, bias=bias))


def _has_four_bits(module: nn.Module) -> bool:
    return hasattr(module.weight, "quant_state")


def _has_four_bit_kernel(weight: Any) -> bool:
    """Whether bitsandbytes has a product for it that never makes the weights wide; bfloat16 on some CPUs."""
    import torch

    state = weight.quant_state
    if weight.device.type != "cpu" or state.dtype != torch.bfloat16:
        return False
    from bitsandbytes import functional

    library: Any = functional
    rows, columns = state.shape
    return bool(
        library.has_avx512bf16()
        and hasattr(functional, "_convert_weight_packed_for_cpu")
        and rows % _BLOCK == 0
        and columns % state.blocksize == 0
    )


def _packed_four_bits(module: nn.Module) -> Product:
    from bitsandbytes import functional

    own: Any = module
    bias = own.bias
    # Into copies: the library itself overwrites the weights, and rounds their scales, in the first forward.
    packed, state = functional._convert_weight_packed_for_cpu(own.weight.data, copy.copy(own.weight.quant_state))

    def product(x: Tensor) -> Tensor:
        result = cast("Tensor", functional.gemv_4bit(x, packed, state=state))
        return result if bias is None else result + bias

    return product


def padded_rows(rows: int) -> int:
    """The number of rows that a product of so many is computed with. Pure.

    oneDNN compiles a kernel for each number of rows and shape of weights, and keeps it: a millisecond and up to a
    megabyte each. So there are not many different ones.
    """
    step = next((step for limit, step in _STEPS if rows <= limit), _STEPS[-1][1])
    return -(-rows // step) * step
