"""The linear modules of a base model, learned from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.models.loading import LOADING
from lora_hub_sdk.registry.admission import ModuleShapes

if TYPE_CHECKING:
    from torch import nn


def module_shapes(folder: Path) -> ModuleShapes:
    """(out_features, in_features) of every linear module, by path, without loading any weights.

    The model is built on torch's meta device, so its size does not matter.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with LOADING, torch.device("meta"):
        model = build(AutoConfig.from_pretrained(folder))
    return linear_shapes(model)


def linear_shapes(model: nn.Module) -> ModuleShapes:
    """As ``module_shapes``, from a built model."""
    shapes = {}
    for path, module in model.named_modules():
        shape = _features(module)
        if shape is not None:
            shapes[path] = shape
    return shapes


def _features(module: nn.Module) -> tuple[int, int] | None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):  # bitsandbytes' layers are Linear too
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):  # GPT-2: the weight is stored as (in, out)
        return module.nf, module.nx
    return None
