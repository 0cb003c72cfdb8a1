"""What adapters can change in a base model, learned from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.models.loading import LOADING
from lora_hub_sdk.registry.layout import BaseLayout

if TYPE_CHECKING:
    from torch import nn


def module_layout(folder: Path) -> BaseLayout:
    """The layout of a base model, without loading any weights.

    The model is built on torch's meta device, so its size does not matter.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with LOADING, torch.device("meta"):
        model = build(AutoConfig.from_pretrained(folder))
    return layout_of(model)


def layout_of(model: nn.Module) -> BaseLayout:
    """As ``module_layout``, from a built model that is not quantized."""
    from torch.nn import Embedding

    linears, whole = linear_shapes(model), dict(model.named_modules())
    found: Any = model
    table, output = found.get_input_embeddings(), found.get_output_embeddings()
    embedding = _path(whole, table) if isinstance(table, Embedding) else None
    head = _path(whole, output)
    owned = {path: _own(module) for path, module in whole.items()}
    kept = {path for path, module in whole.items() if path in linears or path == embedding or is_norm(module)}
    tied = embedding is not None and head is not None and bool(found.config.get_text_config().tie_word_embeddings)
    return BaseLayout(
        linears=linears,
        embedding=None if embedding is None else (embedding, (table.num_embeddings, table.embedding_dim)),
        parameters={path: shapes for path, shapes in owned.items() if shapes and path in kept},
        head=head if head in linears else None,
        tied=tied,
        others=frozenset(path for path, shapes in owned.items() if shapes and path not in kept),
    )


def linear_shapes(model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """(out_features, in_features) of every linear module, by path."""
    shapes = {}
    for path, module in model.named_modules():
        shape = shape_of(module)
        if shape is not None:
            shapes[path] = shape
    return shapes


def is_norm(module: nn.Module) -> bool:
    """Whether this is a LayerNorm or an RMSNorm of any family: nothing but one scale, and perhaps one shift."""
    parameters = dict(module.named_parameters())
    if not type(module).__name__.endswith("Norm") or "weight" not in parameters:
        return False
    return parameters.keys() <= {"weight", "bias"} and all(one.dim() == 1 for one in parameters.values())


def _own(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def _path(modules: Mapping[str, nn.Module], wanted: object) -> str | None:
    return next((path for path, module in modules.items() if module is wanted), None)


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear module, None of others."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):  # bitsandbytes' layers are Linear too
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):  # GPT-2: the weight is stored as (in, out)
        return module.nf, module.nx
    return None
