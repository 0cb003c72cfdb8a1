"""The names that PEFT gives to an adapter's tensors, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PREFIX: Final = "base_model.model."
#: What follows the path of a module that has low-rank factors.
FACTOR_PARTS: Final[Mapping[str, str]] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
}
#: The base's own weight or bias at such a module.
BASE_PARTS: Final = ("base_layer.weight", "base_layer.bias")
_ENDS: Final = tuple(f".{part}" for part in (*FACTOR_PARTS, *BASE_PARTS))


def place_of(key: str) -> tuple[str, str]:
    """The path of the module that a tensor belongs to, and which part of it.

    The part is one of ``FACTOR_PARTS`` or ``BASE_PARTS``, else a parameter of a module that is saved.

    Raises:
        ValueError: PEFT gives no such name.
    """
    name = key.removeprefix(PREFIX)
    end = next((end for end in _ENDS if name.endswith(end)), "")
    path, part = (name[: -len(end)], end[1:]) if end else name.rpartition(".")[::2]
    if name == key or not path:
        raise ValueError(f"{key!r} is no tensor of an adapter")
    return path, part
