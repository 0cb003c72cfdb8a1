"""The routes of a system's questions: found, one failing question apart from the others, and told equal by a key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import (
    AdapterNotFoundError,
    EmptyPromptError,
    LoraHubError,
    NoAdaptersError,
    RetiredError,
    UnsupportedRouteError,
)
from lora_hub_sdk.types import GATED, Route, Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground

#: What one question can meet while others are routed well.
_OF_ONE_QUESTION: Final = (
    AdapterNotFoundError,
    EmptyPromptError,
    NoAdaptersError,
    RetiredError,
    UnsupportedRouteError,
)


def find_routes(ground: Ground, prompts: Sequence[str], routings: Sequence[Routing]) -> list[Route | LoraHubError]:
    """The route of each prompt, or why it has none.

    Raises:
        As ``hub.route``, where the error is not that of one prompt.
    """
    if not prompts:
        return []
    try:
        return list(ground.hub.route(prompts, base_model=ground.base_model, routing=routings))
    except _OF_ONE_QUESTION as error:
        if len(prompts) == 1:
            return [error]
    middle = len(prompts) // 2
    return [
        *find_routes(ground, prompts[:middle], routings[:middle]),
        *find_routes(ground, prompts[middle:], routings[middle:]),
    ]


def route_key(route: Route, gate: str | None, max_new_tokens: int) -> str:
    """The same for routes over one base model that answer a question alike.

    One adapter of weight 1 is that adapter, wherever it is averaged. Weights that differ by rounding alone count as
    equal.

    Args:
        gate: digest of the gate that weighs the members, where one does.
    """
    parts = [f"{member.adapter.digest} {member.weight:.6f}" for member in route.members]
    if route.averaged in GATED and route.members:
        parts += [route.averaged, gate or ""]
    elif len(parts) > 1 or any(member.weight != 1 for member in route.members):
        parts.append(route.averaged)
    return hashlib.sha256("\n".join([str(max_new_tokens), *parts]).encode()).hexdigest()[:16]
