"""What a base model will take in memory, estimated from its files before any of it is loaded."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.engine.linear import PACKED_BYTES

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import ModelSettings

_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "float32": 4, "bfloat16": 2, "float16": 2}
#: Of one weight of a linear module, its share of the scales included.
_QUANTIZED: Final = {"8bit": 1.01, "4bit": 0.52}
#: Parts of names; such tables are looked up, neither quantized nor packed.
_TABLES: Final = ("embed", "wte", "wpe")


def estimated_bytes(folder: Path, settings: ModelSettings) -> int:
    """The size of the weights as they will be loaded, and of the copies that ``linear_products`` packs on a CPU.

    Tensors of whole numbers, as in files that hold a quantized model, count as they are stored.
    """
    on_cpu = _on_cpu(settings.device)
    asked = "float32" if settings.dtype == "auto" and on_cpu else settings.dtype
    whole, linear, tables, has_head = 0.0, 0.0, [0.0], False
    for name, kind, shape, stored in _tensors(folder):
        if kind not in _BYTES:
            whole += stored
            continue
        size = float(prod(shape) * _BYTES.get(asked, _BYTES[kind]))
        is_table, is_head = any(part in name for part in _TABLES), "lm_head" in name
        has_head |= is_head
        if is_table:
            tables.append(size)
        elif len(shape) == 2:
            linear += size
        if settings.quantization is not None and len(shape) == 2 and not (is_table or is_head):
            size = prod(shape) * _QUANTIZED[settings.quantization]
        whole += size
    if on_cpu and settings.quantization is None and asked in ("float32", "bfloat16"):
        linear += 0.0 if has_head else max(tables)  # a head that shares its weight with a table is packed by itself
        whole += linear if linear <= PACKED_BYTES else 0.0
    if on_cpu and settings.quantization == "4bit" and asked == "bfloat16":
        whole += linear / _BYTES[asked] * _QUANTIZED["4bit"]
    return round(whole)


def _tensors(folder: Path) -> list[tuple[str, str, list[int], int]]:
    """Name, dtype, shape and stored bytes of every tensor, from the files' headers."""
    from safetensors import safe_open

    found = []
    for file in sorted(folder.glob("*.safetensors")):
        opened: Any = safe_open(file, "numpy")
        with opened as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                part = tensors.get_slice(name)
                kind, shape = part.get_dtype(), part.get_shape()
                found.append((name, kind, shape, prod(shape) * _stored(kind)))
    return found


def _stored(kind: str) -> int:
    """Bytes of one number, by its name in safetensors: F32, I64, U8, F8_E4M3, BOOL."""
    bits = "".join(character for character in kind.partition("_")[0] if character.isdigit())
    return max(int(bits or 8) // 8, 1)


def _on_cpu(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())
