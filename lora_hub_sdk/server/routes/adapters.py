"""``/v1/adapters``: what adapters there are, which fit a prompt, and how they come and go."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lora_hub_sdk.errors import ModelNotFoundError
from lora_hub_sdk.faces.adapter_facts import adapter_facts, described
from lora_hub_sdk.faces.hub_tools import hub_id
from lora_hub_sdk.server.adapter_bodies import RegisterBody, SearchBody
from lora_hub_sdk.server.bodies import read_body
from lora_hub_sdk.server.document import REFUSALS, body_of
from lora_hub_sdk.server.house import House, house_of
from lora_hub_sdk.server.json_bytes import json_bytes
from lora_hub_sdk.server.refusals import Refusal, Refused
from lora_hub_sdk.types import Adapter

router: Final = APIRouter(tags=["adapters"], responses=REFUSALS)


@router.get("/v1/adapters")
async def adapters(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=512, description="The last name of the page before.")] = None,
) -> Response:
    """A page of the adapters of the caller's namespace by name, retired ones too."""
    house = house_of(request)
    caller, turn = await house.admit(request, "read")
    with turn:
        found = await house.look_up(lambda: house.hub.list(namespace=caller.namespace))
    rest = [one for one in found if after is None or one.name > after]
    return _json({"object": "list", "data": list(map(adapter_facts, rest[:limit])), "has_more": len(rest) > limit})


@router.post("/v1/adapters/search", openapi_extra=body_of(SearchBody))
async def search(request: Request) -> Response:
    """The adapters nearest to a prompt, best first."""
    house = house_of(request)
    caller, turn = await house.admit(request, "read")
    with turn:
        body = await read_body(request, SearchBody, house.settings)
        hits = await house.look_up(
            partial(
                house.hub.search,
                body.query,
                body.k,
                base_model=house.settings.base_model,
                namespace=caller.namespace,
                tags=body.tags or (),
                exclude=body.exclude or (),
                min_trust=body.min_trust,
                rerank=body.rerank,
            )
        )
    rows = [
        {"adapter": adapter_facts(hit.adapter), "score": hit.score, "relevance": hit.relevance, "trust": hit.trust}
        for hit in hits
    ]
    return _json({"object": "list", "data": rows})


@router.post("/v1/adapters", openapi_extra=body_of(RegisterBody), status_code=201)
async def register(request: Request) -> Response:
    """Pull an adapter from the Hub, check it, and make it searchable in the caller's namespace."""
    house = house_of(request)
    caller, turn = await house.admit(request, "register")
    with turn:
        body = await read_body(request, RegisterBody, house.settings)
        adapter = await house.work(partial(_registered, house, body, caller.namespace))
    return _json(adapter_facts(adapter), 201)


@router.get("/v1/adapters/{name:path}")
async def adapter(request: Request, name: str) -> Response:
    """All about one adapter: its facts, some of its samples, its scores."""
    house = house_of(request)
    caller, turn = await house.admit(request, "read")
    with turn:
        found = await house.look_up(partial(described, house.hub, name, caller.namespace))
    return _json(found)


@router.delete("/v1/adapters/{name:path}")
async def remove(request: Request, name: str) -> Response:
    """Forget an adapter; answers that are on their way are finished with it."""
    house = house_of(request)
    caller, turn = await house.admit(request, "register")
    with turn:
        await house.look_up(partial(house.hub.remove, name, namespace=caller.namespace))
    return _json({"object": "adapter.deleted", "name": name, "deleted": True})


def _registered(house: House, body: RegisterBody, namespace: str) -> Adapter:
    base = house.settings.base_model
    if body.base_model is not None and base is not None and not house.chooser.is_base(body.base_model):
        raise _bad(f"this server's base model is {house.chooser.base_name!r}; leave base_model out")
    # Without one, the adapter's own file could name any folder of this machine.
    asked = base or (None if body.base_model is None else hub_id(body.base_model))
    if asked is None:
        raise _bad("this server has no base model of its own; name the one that the adapter is for")
    try:
        return house.hub.register(
            hub_id(body.repo_id),
            samples=body.samples,
            embedding=body.embedding,
            revision=body.revision,
            name=body.name,
            base_model=asked,
            description=body.description,
            tags=body.tags or (),
            namespace=namespace,
            keep_samples=body.keep_samples,
        )
    except ModelNotFoundError:
        raise _bad("nobody has the configuration of that base model, which the adapter is checked against") from None


def _bad(message: str) -> Refused:
    return Refused(Refusal(400, message, code="invalid_value", param="base_model"))


def _json(value: Any, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type="application/json")
