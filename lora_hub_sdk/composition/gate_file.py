"""A gate from its file, of whichever kind it is."""

from __future__ import annotations

import json
import os

from lora_hub_sdk.composition import expert_gate, ramole
from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.composition.ramole import Ramole
from lora_hub_sdk.errors import ConfigurationError


def load_gate(path: str | os.PathLike[str]) -> Ramole | ExpertGate:
    """Read what ``hub.train_gate`` or ``hub.train_experts`` wrote.

    Raises:
        ConfigurationError: the file cannot be read, is no gate, is one of another version, or is damaged.
    """
    kind = _format_of(path)
    if kind == expert_gate.FORMAT:
        return ExpertGate.load(path)
    if kind == ramole.FORMAT:
        return Ramole.load(path)
    raise ConfigurationError(
        f"gate {os.fspath(path)!r}: this file is no gate; hub.train_gate() and hub.train_experts() write such files"
    )


def _format_of(path: str | os.PathLike[str]) -> str | None:
    """What a file says it is; None for a file of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), "pt") as file:
            told = json.loads((file.metadata() or {}).get("lora_hub", "{}"))
    except OSError as error:
        raise ConfigurationError(f"gate {os.fspath(path)!r} cannot be read: {error}") from error
    except (SafetensorError, ValueError):
        return None
    return told.get("format") if isinstance(told, dict) else None
