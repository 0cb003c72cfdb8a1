"""How much an engine may hold and run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.engine.scheduler import EngineLimits

HOST_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """For every engine of a hub, each by itself; see ``Engine``.

    Attributes:
        limits: what may run and wait at once; None is what the memory of the device suggests.
        host_bytes: memory for adapters that were read, beside those in use.
        device_bytes: memory for adapters beside the model; None is what the memory of the device suggests.
    """

    limits: EngineLimits | None = None
    host_bytes: int = HOST_BYTES
    device_bytes: int | None = None
