"""The base model and its tokenizer, loaded once and never changed by any adapter."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

from lora_hub_sdk.engine.input_groups import Groups, input_groups
from lora_hub_sdk.engine.linear import Product, linear_products, packed_paths, using
from lora_hub_sdk.engine.shapes import linear_shapes
from lora_hub_sdk.errors import ConfigurationError, MissingExtraError, ModelDamagedError
from lora_hub_sdk.models import ResolvedModel
from lora_hub_sdk.models.loading import LOADING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
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
    def vocabulary(self) -> int | None:
        """How many tokens the model knows; the tokenizer may have more or fewer. None where that is not to be seen."""
        return _vocabulary(self.model)

    @cached_property
    def embedding(self) -> str | None:
        """The path of the input embedding; None where it is not found as a plain table."""
        from torch.nn import Embedding

        model: Any = self.model
        found = model.get_input_embeddings()
        paths = [path for path, module in self.modules.items() if module is found]
        return paths[0] if paths and isinstance(found, Embedding) else None

    @cached_property
    def products(self) -> Mapping[str, Product]:
        """How each linear module computes its own product."""
        return linear_products(self._linears)

    @cached_property
    def groups(self) -> Groups:
        """The linear modules by the input that they share."""
        # bitsandbytes' own forwards write to what they read: biases, and weights in another order.
        with using(self.modules, self.products):
            return input_groups(self.model, tuple(self.shapes))

    @cached_property
    def size_bytes(self) -> int:
        """What parameters and buffers take, shared ones once, quantized ones as they are stored."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for module in self.modules.values():
            tensors += _quantized_extras(module)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @cached_property
    def packed_bytes(self) -> int:
        """What copies of weights in another order take, beside ``size_bytes``."""
        return sum(packed_paths(self._linears).values())

    @property
    def _linears(self) -> dict[str, nn.Module]:
        return {path: self.modules[path] for path in self.shapes}


def context_of(folder: Path) -> int:
    """How many tokens a prompt and its answer may have together, by the model's config.json alone."""
    from transformers import AutoConfig

    with LOADING:
        return _context(AutoConfig.from_pretrained(folder))


def load_base_model(resolved: ResolvedModel, settings: ModelSettings | None = None) -> BaseModel:
    """Load a base model for inference.

    Raises:
        ConfigurationError: a device that this machine lacks.
        MissingExtraError: a quantization without bitsandbytes.
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
    module: Any
    for module in model.modules():
        # Else its first forward, whoever calls it, writes the weights in another order.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    eos_ids = _eos_ids(model, tokenizer)
    return BaseModel(
        id=resolved.id,
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=torch.float32 if model.dtype not in (torch.bfloat16, torch.float16) else model.dtype,
        context=_context(model.config),
        eos_ids=eos_ids,
        pad_id=_pad_id(tokenizer, eos_ids, _vocabulary(model)),
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
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"quantization={kind!r}", "quantization")
    import torch
    from transformers import BitsAndBytesConfig

    settings: Any = BitsAndBytesConfig
    if kind == "8bit":
        return cast("object", settings(load_in_8bit=True))
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return cast(
        "object",
        settings(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
    )


def _quantized_extras(module: Any) -> list[Tensor]:
    """What bitsandbytes keeps of a quantized weight beside the weight."""
    weight = getattr(module, "weight", None)
    state, own = getattr(weight, "quant_state", None), getattr(module, "state", None)
    levels = [state, getattr(state, "state2", None)]
    found: list[Any] = [getattr(level, name, None) for level in levels for name in ("absmax", "code", "offset")]
    found += [getattr(holder, name, None) for holder in (weight, own) for name in ("SCB", "CB")]
    return [tensor for tensor in found if hasattr(tensor, "untyped_storage")]


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a text: the generation config may name several, the tokenizer one of them."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if token is not None)


def _context(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or _FALLBACK_CONTEXT)


def _pad_id(tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int], vocabulary: int | None) -> int:
    """Any valid id will do: padded positions are masked and their outputs never read."""
    candidates = [tokenizer.pad_token_id, *sorted(eos_ids)]
    return next((token for token in candidates if token is not None and token < (vocabulary or token + 1)), 0)


def _vocabulary(model: Any) -> int | None:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])
