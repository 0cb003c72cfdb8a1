"""The base model and its tokenizer, loaded once and never changed by any adapter."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from lora_hub_sdk.engine.input_groups import Groups, input_groups
from lora_hub_sdk.engine.linear import Product, linear_products
from lora_hub_sdk.engine.shapes import linear_shapes
from lora_hub_sdk.errors import ConfigurationError, ModelDamagedError
from lora_hub_sdk.models import ResolvedModel
from lora_hub_sdk.models.loading import LOADING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["8bit", "4bit"]
_FALLBACK_CONTEXT: Final = 2048


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How a base model is loaded. ``dtype="auto"``: float32 on a CPU, the checkpoint's own elsewhere.

    On a CPU float32 is the exact choice: the same tokens whatever else is in the batch.
    """

    dtype: DType = "auto"
    device: str = "auto"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DType):
            raise ConfigurationError(f"dtype={self.dtype!r} is unknown; choose one of {', '.join(get_args(DType))}")
        if self.quantization is not None and self.quantization not in get_args(Quantization):
            raise ConfigurationError(f"quantization={self.quantization!r} is unknown; choose 8bit, 4bit or None")


@dataclass(frozen=True)
class BaseModel:
    """A causal language model in evaluation mode, its tokenizer, and what decoding needs to know of both."""

    id: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    context: int
    eos_ids: frozenset[int]
    pad_id: int
    modules: Mapping[str, nn.Module] = field(repr=False)
    #: Held for each pass: its adapters act inside the model, so nobody else's pass may run meanwhile.
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of every linear module, by path."""
        return linear_shapes(self.model)

    @cached_property
    def products(self) -> Mapping[str, Product]:
        """How each linear module computes its own product."""
        return linear_products({path: self.modules[path] for path in self.shapes})

    @cached_property
    def groups(self) -> Groups:
        """The linear modules by the input that they share."""
        return input_groups(self.model, tuple(self.shapes))


def load_base_model(resolved: ResolvedModel, settings: ModelSettings | None = None) -> BaseModel:
    """Load a base model for inference.

    Raises:
        ConfigurationError: a device that this machine lacks.
        ModelDamagedError: a folder without a tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = settings or ModelSettings()
    device = _device(settings.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved.folder)
    except (OSError, ValueError) as error:
        problem = f"{resolved.folder}: has no tokenizer that can be loaded ({error})"
        raise ModelDamagedError(resolved.id, [problem]) from error
    dtype: Any = settings.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(
            resolved.folder,
            dtype=dtype,
            quantization_config=_quantization(settings.quantization, dtype),
            device_map=device,
        )
    model.requires_grad_(False)  # from_pretrained leaves it in evaluation mode
    eos_ids = _eos_ids(model, tokenizer)
    return BaseModel(
        id=resolved.id,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=torch.float32 if model.dtype not in (torch.bfloat16, torch.float16) else model.dtype,
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None) or _FALLBACK_CONTEXT,
        eos_ids=eos_ids,
        pad_id=_pad_id(tokenizer, eos_ids),
        modules=dict(model.named_modules()),
    )


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device={name!r} is unknown: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device={name!r} was asked for, this machine shows no CUDA device; use 'cpu'")
    return device


def _quantization(kind: Quantization | None, dtype: str) -> object | None:
    if kind is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    if kind == "8bit":
        return cast("object", settings(load_in_8bit=True))
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return cast("object", settings(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute))


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a text: the generation config may name several, the tokenizer one of them."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if token is not None)


def _pad_id(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> int:
    """Any valid id will do: padded positions are masked and their outputs never read."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(eos_ids, default=0)
