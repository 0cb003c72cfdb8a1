"""What LangChain's caches and tracers know a model by: everything that may change an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from lora_hub_sdk.faces.answer_fields import MODEL, PROMPT, ROUTING, SAMPLING, AnswerFields
from lora_hub_sdk.models import canonical_name, weights_fingerprint

_MARKS: WeakKeyDictionary[Callable[..., Any], str] = WeakKeyDictionary()


def facts_of(model: AnswerFields) -> dict[str, Any]:
    """What the hub holds for a model at this moment: its bases, adapters and gates. Asks SQL, so it may block."""
    facts: dict[str, Any] = {
        "base_models": [_known_by(base) for base in model.possible_bases()],
        # The registry's content, and the fingerprint of the retriever that searches it.
        "registry": model.hub.digest,
    }
    gates = model.hub.gates
    if gates:  # of all strategies, as a call may choose another than the model's
        facts["gates"] = {
            name: {strategy: gate.digest for strategy, gate in own.items()} for name, own in gates.items()
        }
    return facts


def fields_of(model: AnswerFields, *more: str) -> dict[str, Any]:
    """The fields that change an answer, those named in ``more`` included."""
    fields = {name: getattr(model, name) for name in (*ROUTING, *SAMPLING, *PROMPT, *MODEL, *more)}
    return {name: mark(value) if callable(value) else value for name, value in fields.items()}


def mark(function: Callable[..., Any]) -> str:
    """A function's name for a key of a cache; no other function ever has it, in this process or another."""
    try:
        own = _MARKS.setdefault(function, uuid4().hex)
    except TypeError:  # what cannot be kept track of is never the same again
        own = uuid4().hex
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name}@{own}"


def _known_by(base_model: str | Path) -> str:
    """A model's name, and what is in it where that is a folder, of which a name says nothing."""
    base = canonical_name(base_model)
    return f"{base}@{weights_fingerprint(Path(base))}" if Path(base).is_dir() else base
