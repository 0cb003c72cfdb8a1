"""The base's own weights as matrices of numbers, whatever way they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes holds this module's weight in 4 or 8 bits."""
    weight: Any = module.weight
    return hasattr(weight, "quant_state") or not weight.dtype.is_floating_point


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (d_in, d_out): of GPT-2's linears, and of an embedding, whose d_in is the
    vocabulary.
    """
    from torch.nn import Embedding
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Embedding | Conv1D)


def is_turned(module: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight of what was a linear of GPT-2, which it stores as (d_out, d_in)."""
    from transformers.pytorch_utils import Conv1D

    return getattr(module, "source_cls", None) is Conv1D


def stored_weight(module: nn.Module) -> Tensor:
    """A module's weight as it is stored, (d_out, d_in) or transposed, in a floating dtype, on the module's device.

    Only a quantized weight is copied, dequantized by bitsandbytes. What comes back must not be written to.
    """
    weight: Any = module.weight
    if not is_quantized(module):
        plain: Tensor = weight.detach()
        return plain
    from bitsandbytes import functional

    if hasattr(weight, "quant_state"):
        wide: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return wide
    # The module's first pass moves both from the weight to the module.
    state: Any = module.state
    scales = weight.SCB if weight.SCB is not None else state.SCB
    eight: Tensor = functional.int8_vectorwise_dequant(weight.data if weight.CB is None else weight.CB, scales)
    return eight
