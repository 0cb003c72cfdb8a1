"""Small tensors in one safetensors file with facts beside them, written as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

_Gate = TypeVar("_Gate")


def read_gate(path: str | os.PathLike[str], of: Callable[[bytes], _Gate], maker: str) -> _Gate:
    """A gate from its file; ``maker`` is what writes such files, for errors.

    Raises:
        ConfigurationError: the file cannot be read, or ``of`` raised it.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"gate {os.fspath(path)!r} cannot be read: {error}") from error
    try:
        return of(content)
    except ConfigurationError as error:
        raise ConfigurationError(f"gate {os.fspath(path)!r}: {error}; {maker} makes one") from error


def tensor_bytes(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> bytes:
    """A safetensors file: the same bytes for the same tensors and metadata."""
    from safetensors.torch import save

    # The library lays tensors out by name, and metadata in the order of a hash table with a random seed: one entry has
    # one order.
    one = {"lora_hub": json.dumps(dict(told), sort_keys=True)}
    # Copies, as the library refuses tensors that share memory.
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, metadata=one)


def read_tensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``tensor_bytes`` was given.

    Raises:
        ConfigurationError: this is no safetensors file, or nothing that we wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        told = json.loads(json.loads(content[8 : 8 + size]).get("__metadata__", {}).get("lora_hub", "{}"))
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"this is no whole safetensors file ({error})") from error
    if not isinstance(told, dict):
        raise ConfigurationError("its metadata are not of this package")
    return tensors, told


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that whoever reads it sees all of it, or what was there before."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
