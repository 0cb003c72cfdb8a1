"""An adapter's files, read quickly: its factors at once, the proof that they are the registered ones meanwhile."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from mmap import mmap
from typing import cast

from lora_hub_sdk.composition.factors import AdapterFactors, factors_from_buffer
from lora_hub_sdk.errors import AdapterChangedError, AdmissionError
from lora_hub_sdk.registry.adapter_config import adapter_config_from_bytes, read_config_bytes
from lora_hub_sdk.registry.admission import WEIGHTS_FILE, content_digest
from lora_hub_sdk.types import Adapter


@dataclass(frozen=True, slots=True)
class Unverified:
    """Factors that are ready for use, and the content that they are views of.

    Nothing made with them may be delivered before ``verify`` has returned. Other threads can run meanwhile.
    """

    adapter: Adapter
    factors: AdapterFactors
    config: bytes
    weights: mmap

    def verify(self) -> None:
        """Compute the digest of the content that the factors are views of.

        Raises:
            AdapterChangedError: it is not the one that was registered.
        """
        _check(self.adapter, self.config, self.weights)


def load_factors(adapter: Adapter) -> AdapterFactors:
    """Read an adapter from its folder, only if it still is what was registered.

    Raises:
        AdapterChangedError: the files are gone or have another digest.
    """
    opened = open_factors(adapter)
    opened.verify()
    return opened.factors


def open_factors(adapter: Adapter) -> Unverified:
    """Read an adapter from its folder; whether it still is what was registered is left to ``Unverified.verify``.

    The file is copied into private memory, and what is digested is what is used. Mapping the file itself would save
    little of the time, and whoever writes to it later would change factors that were found good, or, by cutting it,
    end the process with SIGBUS. The memory is mapped by itself and not taken from the heap, so that all of it goes
    back to the system with the last factor: a heap of large buffers that come and go keeps much more than they need.

    Raises:
        AdapterChangedError: the files are gone, of another size, or no adapter any more.
    """
    try:
        config = read_config_bytes(adapter.folder, adapter.name)
        weights = _read_weights(adapter)
    except (OSError, AdmissionError) as error:
        raise AdapterChangedError(
            f"the files of adapter {adapter.name!r} are gone from {adapter.folder} ({error}); register it again"
        ) from error
    try:
        parsed = adapter_config_from_bytes(config, adapter.name)
        factors = factors_from_buffer(weights, parsed, adapter.digest)
    except Exception:
        # What was admitted can be read, so this is most likely something else.
        _check(adapter, config, weights)
        raise
    return Unverified(adapter, factors, config, weights)


def _check(adapter: Adapter, config: bytes, weights: mmap) -> None:
    found = content_digest(config, cast(bytes, weights))  # hashing takes any buffer, and runs beside other threads
    if found != adapter.digest:
        raise _changed(adapter, f"digest {adapter.digest[:12]}", found[:12])


def _changed(adapter: Adapter, registered: str, found: str) -> AdapterChangedError:
    return AdapterChangedError(
        f"adapter {adapter.name!r} was registered with {registered}, {adapter.folder} now holds {found}; "
        "remove it and register it again"
    )


def _read_weights(adapter: Adapter) -> mmap:
    # A pipe in the file's place would block for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(adapter.folder / WEIGHTS_FILE, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{WEIGHTS_FILE} is no regular file")
        if status.st_size != adapter.size_bytes:
            raise _changed(adapter, f"{adapter.size_bytes} bytes of weights", str(status.st_size))
        return _content(descriptor, adapter.size_bytes)
    finally:
        os.close(descriptor)


def _content(descriptor: int, size: int) -> mmap:
    content = _private_memory(size)
    with open(descriptor, "rb", buffering=0, closefd=False) as file, memoryview(content) as room:
        filled = 0
        # One read gives at most 2 GiB, and none where the file was cut meanwhile.
        while filled < size and (count := file.readinto(room[filled:])):
            filled += count
    return content


def _private_memory(size: int) -> mmap:
    if sys.platform == "win32":
        return mmap(-1, size)
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE

    return mmap(-1, size, flags=MAP_ANONYMOUS | MAP_PRIVATE)
