"""``/v1/models``: what the field ``model`` may be."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from lora_hub_sdk.composition.strategies import STRATEGIES
from lora_hub_sdk.errors import AdapterNotFoundError
from lora_hub_sdk.faces.adapter_facts import shown_name
from lora_hub_sdk.server.choosing import AUTO, BASE
from lora_hub_sdk.server.document import REFUSALS
from lora_hub_sdk.server.house import House, house_of
from lora_hub_sdk.server.json_bytes import json_bytes
from lora_hub_sdk.types import GATED

router: Final = APIRouter(tags=["models"], responses=REFUSALS)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The ways to choose adapters, the base model, and the adapters in service, by name."""
    house = house_of(request)
    caller, turn = await house.admit(request, "read")
    with turn:
        rows = await house.look_up(partial(_rows, house, caller.namespace))
    return Response(json_bytes({"object": "list", "data": rows}), media_type="application/json")


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One of them."""
    house = house_of(request)
    caller, turn = await house.admit(request, "read")
    with turn:
        rows = await house.look_up(partial(_rows, house, caller.namespace))
    for row in rows:
        if row["id"] == model:
            return Response(json_bytes(row), media_type="application/json")
    raise AdapterNotFoundError(model, namespace=caller.namespace)


def _rows(house: House, namespace: str) -> list[dict[str, Any]]:
    searching = [AUTO, *(f"{AUTO}:{name}" for name, strategy in STRATEGIES.items() if _can_search(house, name))]
    base = house.settings.base_model
    own = house.chooser.base_name
    bases = map(shown_name, house.hub.base_models(namespace)) if own is None else [BASE, own]
    adapters = house.hub.list(namespace=namespace, base_model=base)
    return [
        *(_row(name, house.began, "lora-hub") for name in searching),
        *(_row(name, house.began, "base-model") for name in dict.fromkeys(bases)),
        *(
            _row(one.name, int(one.created_at.timestamp()), "adapter", base_model=shown_name(one.base_model))
            for one in adapters
            if one.state == "active"
        ),
    ]


def _can_search(house: House, strategy: str) -> bool:
    """The base model searches for nothing, fixed adapters do not tell a base model, and a gate has to be in use."""
    known = STRATEGIES[strategy]
    if known.limit == 0 or (known.fixed and house.settings.base_model is None):
        return False
    return known.averaged not in GATED or any(strategy in gates for gates in house.hub.gates.values())


def _row(name: str, created: int, owner: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": owner, **more}
