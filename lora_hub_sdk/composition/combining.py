"""Which adapters cannot be combined as asked, whatever each of them is by itself."""

from __future__ import annotations

from collections.abc import Mapping

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.errors import UnsupportedRouteError
from lora_hub_sdk.types import GATED, Route


def check_combining(route: Route, factors: Mapping[str, AdapterFactors]) -> None:
    """Refuse what has no one meaning; ``factors`` of the route's members by digest, fitted to the base.

    - A gate scores adapters by low-rank factors: gains, shifts and whole modules have none.
    - A fusion averages A and B apart, and so does SMEAR. Of a PiSSA or OLoRA adapter, B A is known but not A and B:
      those that the base lost may have either sign.

    Raises:
        UnsupportedRouteError: names the adapter and what to do.
    """
    members = [member.adapter for member in route.members if member.weight]
    alone = len({adapter.digest for adapter in members}) == 1
    for adapter in members:
        own = factors[adapter.digest]
        if route.averaged in GATED and (kept := _beside(own)):
            raise UnsupportedRouteError(
                f"adapter {adapter.name!r} has {kept}, and a gate weighs low-rank factors only; use strategy "
                "'mixture', or leave it out with exclude"
            )
        if route.averaged in ("parameters", "prompt") and own.converted and not alone:
            raise UnsupportedRouteError(
                f"adapter {adapter.name!r} was trained by PiSSA or OLoRA, and its A and B cannot be averaged with "
                "others' apart; use strategy 'mixture', or leave it out with exclude"
            )


def _beside(factors: AdapterFactors) -> str:
    """What an adapter has beside factors, in words."""
    if any(one.gain is not None for one in factors.modules.values()):
        return "a gain (DoRA)"
    if any(one.shift is not None for one in factors.modules.values()):
        return "biases"
    return "modules of its own (modules_to_save)" if factors.saved else ""
