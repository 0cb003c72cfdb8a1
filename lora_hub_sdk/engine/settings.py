"""How much an engine may hold and run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.errors import ConfigurationError

HOST_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """For every engine of a hub, each by itself; see ``Engine``. ``base_bytes`` is for all of them together.

    Attributes:
        limits: what may run and wait at once; None is what the memory of the device suggests.
        host_bytes: memory for adapters that were read, beside those in use.
        device_bytes: memory for adapters beside the model; None is what the memory of the device suggests.
        base_bytes: memory for the base models of all engines; where another one is asked for, those that were not used
            for longest are unloaded. None is no bound.

    Raises:
        ConfigurationError: ``base_bytes`` below 1.
    """

    limits: EngineLimits | None = None
    host_bytes: int = HOST_BYTES
    device_bytes: int | None = None
    base_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.base_bytes is not None and self.base_bytes < 1:
            raise ConfigurationError(f"base_bytes={self.base_bytes}: expected 1 or more, or None for no bound")
