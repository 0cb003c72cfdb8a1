"""Many requests to one engine, each answer as soon as it is there; one that fails takes no other with it."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import partial
from queue import SimpleQueue
from time import sleep
from typing import TYPE_CHECKING, Final, TypeVar

from lora_hub_sdk.errors import (
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    LoraHubError,
    MissingExtraError,
    RequestCancelledError,
)

if TYPE_CHECKING:
    from lora_hub_sdk.engine.engine import Engine
    from lora_hub_sdk.engine.request import Request
    from lora_hub_sdk.engine.ticket import Ticket
    from lora_hub_sdk.types import Completion

_T = TypeVar("_T")
#: These say nothing of the one request that met them.
FATAL: Final = (EngineClosedError, EngineCrashedError, MissingExtraError, RequestCancelledError)
_AGAIN_S: Final = 0.01


def ask(
    engine: Engine, requests: Iterable[tuple[_T, Request]], window: int
) -> Generator[tuple[_T, Completion | LoraHubError]]:
    """Hand requests in, never more than ``window`` of them at once, and give each its answer or its error.

    The engine is kept full: the next request goes in as soon as any answer is there. Closing the generator early gives
    up what is on its way.

    Args:
        requests: each with what the caller knows it by.

    Raises:
        EngineClosedError, EngineCrashedError, MissingExtraError, RequestCancelledError: there will be no more answers.
    """
    ended: SimpleQueue[tuple[int, _T]] = SimpleQueue()
    waiting: dict[int, Ticket] = {}

    def next_answer() -> tuple[_T, Completion | LoraHubError]:
        number, item = ended.get()
        try:
            return item, waiting.pop(number).result()
        except FATAL:
            raise
        except LoraHubError as error:
            return item, error

    try:
        for number, (item, request) in enumerate(requests):
            while len(waiting) >= window:
                yield next_answer()
            try:
                ticket = _submitted(engine, request)
            except FATAL:
                raise
            except LoraHubError as error:
                yield item, error
            else:
                waiting[number] = ticket
                ticket.future.add_done_callback(partial(_put, ended, (number, item)))
        while waiting:
            yield next_answer()
    finally:
        for ticket in waiting.values():
            ticket.cancel()


def _submitted(engine: Engine, request: Request) -> Ticket:
    while True:
        try:
            return engine.submit(request)
        except EngineBusyError:  # others ask it too
            sleep(_AGAIN_S)


def _put(ended: SimpleQueue[tuple[int, _T]], which: tuple[int, _T], _: object) -> None:
    ended.put(which)
