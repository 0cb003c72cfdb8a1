"""``/health``, ``/ready`` and ``/metrics``: for those who keep the server running."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from lora_hub_sdk.server.document import REFUSALS
from lora_hub_sdk.server.house import house_of
from lora_hub_sdk.server.json_bytes import json_bytes

router: Final = APIRouter(tags=["running"], responses=REFUSALS)


@router.get("/health")
async def health() -> Response:
    """Whether the process answers at all."""
    return Response(json_bytes({"status": "ok"}), media_type="application/json")


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 once the base model is loaded, 503 before, and again from when the server was told to stop."""
    house = house_of(request)
    is_ready = house.is_ready()
    status = "ready" if is_ready else "draining" if house.draining else "loading"
    return Response(json_bytes({"status": status}), 200 if is_ready else 503, media_type="application/json")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """What the server and its engines count, in Prometheus' text format."""
    house = house_of(request)
    _, turn = await house.admit(request, "metrics")
    with turn:
        page = house.metrics.page() + await house.look_up(house.hub.metrics)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")
