"""The model card of an exported route: whose adapters it is made of, with what weights, and how exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.registry.adapter_config import printable

if TYPE_CHECKING:
    from lora_hub_sdk.composition.export import Exported
    from lora_hub_sdk.types import Member, Route

_HOW: Final = {
    "outputs": "their outputs added with these weights",
    "parameters": "their A and their B averaged with these weights, as LoraRetriever's fusion does",
}
_CARD: Final = """---
{header}
---
# {name}

{count} adapter(s) for {base} as one LoRA of rank {rank}, {how} (strategy `{strategy}`). Made by lora_hub_sdk.

| weight | adapter | from | revision | content (sha256) | licence |
|---|---|---|---|---|---|
{rows}

Relative error: {error:.2g} of all modules together, {largest:.2g} of the worst one (Frobenius norm of what is missing,
as a share of the exact delta). From rank {exact_rank} on, only rounding is lost.
"""


def export_card(name: str, route: Route, members: Sequence[Member], exported: Exported) -> str:
    """A README.md as the Hub reads it; no path of this machine stands in it."""
    base = members[0].adapter.base_model
    on_hub = not os.path.isabs(base)
    licences = {member.adapter.license for member in members}
    header: dict[str, object] = {
        **({"base_model": base} if on_hub else {}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"license": licence} if len(licences) == 1 and (licence := licences.pop()) else {}),
        "tags": [*([f"base_model:adapter:{base}"] if on_hub else []), "lora", "lora-hub-sdk"],
    }
    return _CARD.format(
        # JSON is YAML, and a stranger's licence cannot break out of it.
        header="\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items()),
        name=_cell(name),
        count=len(members),
        base=_cell(base) if on_hub else "a local base model",
        rank=exported.rank,
        how=_HOW[route.averaged],
        strategy=route.strategy,
        rows="\n".join(map(_row, members)),
        error=exported.relative_error,
        largest=exported.largest_error,
        exact_rank=exported.exact_rank,
    )


def _row(member: Member) -> str:
    adapter = member.adapter
    source = "a local folder" if os.path.isabs(adapter.repo_id) else adapter.repo_id
    return (
        f"| {member.weight:.6g} | {_cell(adapter.name)} | {_cell(source)} | {adapter.revision} | {adapter.digest} "
        f"| {_cell(adapter.license or '-')} |"
    )


def _cell(text: str) -> str:
    """A stranger's text as plain text in a table."""
    return "".join(f"\\{letter}" if letter in "|`*_<>[]\\" else letter for letter in printable(text))
