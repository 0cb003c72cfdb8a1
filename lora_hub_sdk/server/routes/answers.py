"""``/v1/completions`` and ``/v1/chat/completions``: from a body to an answer, whole or while it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from lora_hub_sdk.errors import AdapterNotFoundError
from lora_hub_sdk.faces.adapter_facts import shown_name
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Prompt
from lora_hub_sdk.server.auth import Caller
from lora_hub_sdk.server.bodies import read_body
from lora_hub_sdk.server.chat_body import ChatBody
from lora_hub_sdk.server.choosing import Choice
from lora_hub_sdk.server.completion_body import CompletionBody
from lora_hub_sdk.server.document import REFUSALS, body_of
from lora_hub_sdk.server.event_stream import EventStream
from lora_hub_sdk.server.events import Events
from lora_hub_sdk.server.feed import Feed
from lora_hub_sdk.server.fields import Answered
from lora_hub_sdk.server.hang_up import while_connected
from lora_hub_sdk.server.house import House, house_of
from lora_hub_sdk.server.json_bytes import json_bytes
from lora_hub_sdk.server.limits import Pass
from lora_hub_sdk.server.refusals import Refusal, Refused
from lora_hub_sdk.server.replies import Letterhead
from lora_hub_sdk.types import Sampling

router: Final = APIRouter(tags=["answers"], responses=REFUSALS)


@router.post("/v1/completions", openapi_extra=body_of(CompletionBody))
async def completions(request: Request) -> Response:
    """Answer prompts, each with the adapters that fit it; the route is told beside."""
    house = house_of(request)
    caller, turn = await house.admit(request, "generate")
    try:
        body = await read_body(request, CompletionBody, house.settings)
        if len(body.prompts) > house.settings.max_prompts:
            raise _bad("prompt", f"{len(body.prompts)} prompts; at most {house.settings.max_prompts} at one time here")
        sampling = body.sampling(_longest(body.longest, house))
        choice = await _choice(house, body, caller.namespace)
        return await _answered(
            request, turn, Letterhead("text", body.model), body, body.prompts, choice, sampling, caller
        )
    except BaseException:
        turn.leave()
        raise


@router.post("/v1/chat/completions", openapi_extra=body_of(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation with the adapters that fit it, in text or by calls of tools; the route is told beside."""
    house = house_of(request)
    caller, turn = await house.admit(request, "generate")
    try:
        body = await read_body(request, ChatBody, house.settings)
        sampling = replace(body.sampling(_longest(body.longest, house)), constraint=body.constraint())
        prompts = [body.conversation()]
        choice = await _choice(house, body, caller.namespace)
        return await _answered(request, turn, Letterhead("chat", body.model), body, prompts, choice, sampling, caller)
    except BaseException:
        turn.leave()
        raise


async def _answered(
    request: Request,
    turn: Pass,
    head: Letterhead,
    body: Answered,
    prompts: Sequence[Prompt],
    choice: Choice,
    sampling: Sampling,
    caller: Caller,
) -> Response:
    house = house_of(request)
    template = body.template or house.settings.template
    options: dict[str, Any] = {
        "base_model": choice.base_model,
        "routing": choice.routing,
        "sampling": sampling,
        "template": None if template == "none" else template,
        "settings": house.model_settings,
        "timeout_s": house.settings.timeout_s,
        # A key takes turns with others, however many requests it sends; without keys each request is somebody's.
        "client": f"key {caller.id}" if house.settings.auth == "keys" else None,
    }
    if body.stream:
        feed = Feed([house.hub.astream(prompt, **options) for prompt in prompts])
        events = Events(head, len(prompts), with_usage=body.with_usage)
        stream = EventStream(
            request, feed, events, answer_id=head.answer_id, timeout_s=house.settings.timeout_s, on_end=turn.leave
        )
        await stream.begin()
        return stream
    try:
        found = await while_connected(request, house.hub.agenerate(prompts, **options))
    finally:
        turn.leave()
    return Response(json_bytes(head.answer(found)), 200, {"x-request-id": head.answer_id}, "application/json")


async def _choice(house: House, body: Answered, namespace: str) -> Choice:
    choice = house.chooser.chosen(body, namespace)
    if choice.named and choice.base_model is None:
        base = await house.look_up(partial(_base_called, house.hub, body.model, namespace))
        if base is not None:
            return house.chooser.of_base(base, namespace)
    return choice


def _base_called(hub: LoraHub, name: str, namespace: str) -> str | None:
    """The base model that a name stands for where no adapter has it, among those of the namespace's adapters."""
    try:
        hub.get(name, namespace=namespace)
    except AdapterNotFoundError:
        return next((base for base in hub.base_models(namespace) if shown_name(base) == name), None)
    return None


def _longest(asked: int | None, house: House) -> int:
    if asked is None:
        return house.new_tokens
    if asked > house.settings.max_new_tokens:
        most = house.settings.max_new_tokens
        raise _bad("max_tokens", f"{asked} tokens were asked for, {most} is the longest answer here")
    return asked


def _bad(param: str, message: str) -> Refused:
    return Refused(Refusal(400, message, code="invalid_value", param=param))
