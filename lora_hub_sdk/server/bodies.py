"""The body of a request: read within its bounds of size and time, and checked before anything is done with it."""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from lora_hub_sdk.server.refusals import Refusal, Refused
from lora_hub_sdk.server.settings import ServerSettings

_Body = TypeVar("_Body", bound=BaseModel)
_MOST_TOLD: Final = 3
_LONGEST: Final = 200


async def read_body(request: Request, kind: type[_Body], settings: ServerSettings) -> _Body:
    """What a client sent, as one of our models.

    Raises:
        Refused: 400 for what is no such body, 408, 413 or 415; 499 where the client went away.
    """
    # Pages of other sites can make a browser send anything but this type without asking the server first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(Refusal(415, "expected a body of content-type application/json", code="unsupported_media_type"))
    try:
        async with asyncio.timeout(settings.body_s):
            raw = await _bounded(request, settings.max_body_bytes)
    except TimeoutError:
        raise Refused(Refusal(408, "the body did not come in time", code="body_timeout")) from None
    except ClientDisconnect:
        raise Refused(Refusal(499, "the client went away", code="gone")) from None
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise Refused(_told(error)) from None


async def _bounded(request: Request, limit: int) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(limit: int) -> Refused:
    return Refused(Refusal(413, f"the body is larger than {limit} bytes, the most that is read", code="too_large"))


def _told(error: ValidationError) -> Refusal:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{_place(one['loc'])}{one['msg']}" for one in found[:_MOST_TOLD]]
    more = f"; and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    first = found[0]
    param = str(first["loc"][0])[:_LONGEST] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        lines[0] = f"{_place(first['loc'])}there is no such field, or this server does not honour it; leave it out"
    return Refusal(400, "; ".join(lines) + more, code=str(first["type"]), param=param)


def _place(loc: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in loc)[:_LONGEST] + ": " if loc else ""
