"""What an engine writes to the log ``lora_hub_sdk.engine``: records with fields, never a prompt or an answer."""

from __future__ import annotations

import logging
from itertools import chain, repeat
from typing import Final

from lora_hub_sdk.engine.metrics import Outcome
from lora_hub_sdk.types import Route, Tier, Timing, Usage

_LOG: Final = logging.getLogger("lora_hub_sdk.engine")


def log_request(
    request_id: int,
    outcome: Outcome,
    *,
    base_model: str,
    route: Route,
    tiers: tuple[Tier, ...] = (),
    timing: Timing | None = None,
    usage: Usage | None = None,
    error: BaseException | None = None,
) -> None:
    """One INFO record of a request that ended; ``tiers`` may be empty, where its adapters were never looked for.

    Of an error only the class is told, as its text may quote the prompt.
    """
    if not _LOG.isEnabledFor(logging.INFO):
        return
    adapters = [
        {"name": member.adapter.name, "weight": member.weight, "score": member.score, "tier": tier}
        for member, tier in zip(route.members, chain(tiers, repeat(None)), strict=False)
    ]
    fields = {
        "event": "request",
        "request_id": request_id,
        "outcome": outcome,
        "base_model": base_model,
        "strategy": route.strategy,
        "adapters": adapters,
        "timing": None if timing is None else timing.as_dict(),
        "tokens": None if usage is None else usage.as_dict(),
        "error": None if error is None else type(error).__name__,
    }
    _LOG.info("request %d ended: %s", request_id, outcome, extra=fields)


def log_split(rows: int, *, base_model: str, error: BaseException) -> None:
    """One WARNING: a forward pass over ``rows`` failed, and they are tried again in smaller batches."""
    fields = {"event": "split", "base_model": base_model, "rows": rows, "error": type(error).__name__}
    _LOG.warning("a pass over %d rows failed (%s); trying them apart", rows, type(error).__name__, extra=fields)


def log_crash(error: BaseException, *, base_model: str) -> None:
    """One ERROR, with the traceback: the thread that owns the model died."""
    fields = {"event": "crash", "base_model": base_model, "error": type(error).__name__}
    _LOG.error("the engine of %s died of %s", base_model, type(error).__name__, extra=fields, exc_info=error)
