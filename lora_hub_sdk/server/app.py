"""The app: routes, and one form for everything that goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lora_hub_sdk.errors import LoraHubError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.server.counting import Counting
from lora_hub_sdk.server.document import add_document
from lora_hub_sdk.server.faults import EXPECTED, refusal_of
from lora_hub_sdk.server.house import House
from lora_hub_sdk.server.refusals import Refusal, Refused
from lora_hub_sdk.server.routes import adapters, answers, health, models
from lora_hub_sdk.server.settings import ServerSettings

_log = logging.getLogger(__name__)
_ROUTERS: Final = (answers.router, models.router, adapters.router, health.router)


def create_app(hub: LoraHub, settings: ServerSettings | None = None) -> FastAPI:
    """A server's app, to be run by ``running.serve`` or by any ASGI server with one process.

    The hub stays its owner's, who closes it after the app. The app's ``state.house`` is what its requests share.
    """
    settings = settings or ServerSettings()
    house = House(hub, settings)
    app = FastAPI(
        title="lora-hub",
        description="Many LoRA adapters, one model. In the form of OpenAI's interface.",
        lifespan=_life,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.house = house
    for router in _ROUTERS:
        app.include_router(router)
    for kind, answer in (
        (LoraHubError, _refused_by_us),
        (Refused, _refused),
        (RequestValidationError, _bad_query),
        (HTTPException, _no_route),
        (Exception, _fault),
    ):
        app.add_exception_handler(kind, answer)
    app.add_middleware(Counting, metrics=house.metrics)
    add_document(app, with_keys=settings.auth == "keys")
    return app


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncGenerator[None]:
    house: House = app.state.house
    warming = asyncio.create_task(house.warm_up_aside())
    try:
        yield
    finally:
        warming.cancel()
        house.draining = True
        house.close()


async def _refused_by_us(_: Request, error: Exception) -> Response:
    assert isinstance(error, LoraHubError)
    refusal = refusal_of(error)
    if refusal.status >= 500 and not isinstance(error, EXPECTED):
        _log.warning("a request failed: %s", error, exc_info=error)
    return refusal.response


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.refusal.response


async def _bad_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])[:100]
    return Refusal(400, f"{name}: {first['msg']}", code=str(first["type"]), param=name).response


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, str(error.detail), code="no_route").response


async def _fault(_: Request, error: Exception) -> Response:
    """It is raised again after this, so that the log has it."""
    return Refusal(500, "the server made a mistake; its log tells which", "server_error", "internal_error").response
