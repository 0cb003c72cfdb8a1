"""The routing desk: what many callers ask one by one is routed together, as a batch takes less than its parts.

There is no timer: while one group is being routed, the next one gathers.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from lora_hub_sdk.composition.router import check_base
from lora_hub_sdk.composition.strategies import check_routing, get_strategy
from lora_hub_sdk.errors import DeadlineExceededError, EngineClosedError, EngineCrashedError, RegistryError
from lora_hub_sdk.retriever.query import check_prompts
from lora_hub_sdk.types import Route, Routing

#: None leaves it to each prompt's nearest adapter.
BaseModel = str | os.PathLike[str] | None
RouteBatch = Callable[[Sequence[str], BaseModel, Routing], list[Route]]
_Kind = tuple[str | None, str]

#: Prompts that are routed together: enough for a full batch, few enough that the engine soon has something to do.
_GROUP: Final = 64
#: A call of more is a batch by itself; it must not hold up those of one prompt.
_LARGE: Final = 32
#: A call may have thousands; between so many it is seen whether somebody still waits for them.
_PART: Final = 256


class RoutingDesk:
    """Routes the prompts of many callers, each with an error or a result of its own. Thread-safe.

    Three windows serve side by side: searches, searches of large calls, and routes that need no search.

    Args:
        route: routes prompts of one base model, or of none, and one routing, as ``Router.route``; called by up to three
            threads.
    """

    def __init__(self, route: RouteBatch) -> None:
        self._searches = _Window("lora-hub-searches", route)
        self._large = _Window("lora-hub-large-searches", route)
        self._lookups = _Window("lora-hub-lookups", route)

    def submit(self, prompts: Sequence[str], base_model: BaseModel, routing: Routing) -> Future[list[Route]]:
        """One route for each prompt, in their order, as soon as they are known; cancelling takes the call back.

        The future is never marked as running, so it can be cancelled until it is done.

        The future fails as ``Router.route`` does, by no other caller's fault; with EngineClosedError where the desk is
        closed first; with EngineCrashedError where the thread behind it was told to exit.

        Raises:
            UnknownStrategyError, ConfigurationError, EmptyPromptError: a call that makes no sense; it names the row.
            EngineClosedError: the desk is closed.
        """
        check_routing(routing)
        check_base(base_model, routing)
        check_prompts(prompts)
        call = _Call(tuple(prompts), base_model, routing)
        self._window_for(call).take(call)
        return call.future

    def route(
        self, prompts: Sequence[str], base_model: BaseModel, routing: Routing, *, timeout_s: float | None = None
    ) -> list[Route]:
        """As ``submit``, waiting for it.

        Raises:
            DeadlineExceededError: ``timeout_s`` seconds were not enough.
            As ``submit`` and its future.
        """
        future = self.submit(prompts, base_model, routing)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():  # an error of the routing itself, or just in time
                return future.result()
            raise _too_late(timeout_s) from None
        finally:
            future.cancel()

    async def aroute(
        self, prompts: Sequence[str], base_model: BaseModel, routing: Routing, *, timeout_s: float | None = None
    ) -> list[Route]:
        """As ``route``, leaving the event loop to others; cancelling the task takes the call back."""
        future = asyncio.wrap_future(self.submit(prompts, base_model, routing))
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await future
        except TimeoutError:
            if limit.expired():
                raise _too_late(timeout_s) from None
            raise

    def close(self) -> None:
        """Finish what is being routed, large calls excepted, fail what waits, and refuse what comes.

        May be called twice.
        """
        windows = (self._searches, self._large, self._lookups)
        for window in windows:
            window.refuse()
        for window in windows:
            window.join()

    def _window_for(self, call: _Call) -> _Window:
        strategy = get_strategy(call.routing.strategy)
        if call.routing.adapters is not None or strategy.limit == 0 or strategy.fixed:
            return self._lookups
        return self._large if len(call.prompts) > _LARGE else self._searches


@dataclass(frozen=True, slots=True)
class _Call:
    """What one caller asked; it stays together, so that an error that tells a row tells the caller's."""

    prompts: tuple[str, ...]
    base_model: BaseModel
    routing: Routing
    future: Future[list[Route]] = field(default_factory=Future)

    @property
    def kind(self) -> _Kind:
        """Calls of one kind can be routed together. Not the routing itself: it may hold lists, and 1 equals True."""
        return None if self.base_model is None else os.fspath(self.base_model), repr(self.routing)

    def resolve(self, routes: list[Route]) -> None:
        with suppress(InvalidStateError):  # taken back meanwhile
            self.future.set_result(routes)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class _Window:
    """One thread and the calls that wait for it, by kind; the kinds take turns, so that none waits for ever."""

    def __init__(self, name: str, route: RouteBatch) -> None:
        self._route = route
        self._lock = threading.Lock()
        self._waiting: OrderedDict[_Kind, deque[_Call]] = OrderedDict()
        self._working = False
        self._closed = False
        # Its thread starts with the first call, and the interpreter's exit waits for what it has in hand.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    def take(self, call: _Call) -> None:
        kind = call.kind
        with self._lock:
            if self._closed:
                raise _closed()
            if not self._working:
                self._pool.submit(self._work)
                self._working = True
            self._waiting.setdefault(kind, deque()).append(call)

    def refuse(self) -> None:
        with self._lock:
            self._closed = True
            left = self._all()
        for call in left:
            call.fail(_closed())

    def join(self) -> None:
        self._pool.shutdown()

    def _work(self) -> None:
        group: list[_Call] = []
        try:
            while group := self._next():
                self._serve(group)
        except BaseException as error:  # SystemExit and the like would end the thread, and leave all who wait hanging
            with self._lock:
                self._working = False
                left = self._all()
            for call in (*group, *left):
                crash = EngineCrashedError(f"the thread that routes prompts died of {error!r}; ask again")
                crash.__cause__ = error
                call.fail(crash)

    def _next(self) -> list[_Call]:
        """The calls to route now, of one kind; none where no call waits."""
        group: list[_Call] = []
        with self._lock:
            while self._waiting and not group:
                kind, calls = self._waiting.popitem(last=False)
                size = 0
                while calls and (not size or size + len(calls[0].prompts) <= _GROUP):
                    call = calls.popleft()
                    if not call.future.cancelled():
                        group.append(call)
                        size += len(call.prompts)
                if calls:
                    self._waiting[kind] = calls
            self._working = bool(group)
        return group

    def _serve(self, group: Sequence[_Call]) -> None:
        if not self._settle(group):
            for call in group:
                self._settle([call])

    def _settle(self, group: Sequence[_Call]) -> bool:
        """Give each call its routes or its error; False where there is an error and nobody knows whose."""
        try:
            routes = iter(self._routes(group))
        except RegistryError as error:
            # It is not about the prompts. Asking again for each call may mean to wait as often for a locked database.
            for call in group:
                call.fail(_like(error))
        except Exception as error:
            if len(group) > 1:
                return False
            group[0].fail(_bearable(error))
        else:
            for call in group:
                call.resolve([next(routes) for _ in call.prompts])
        return True

    def _routes(self, group: Sequence[_Call]) -> list[Route]:
        prompts = [prompt for call in group for prompt in call.prompts]
        routes: list[Route] = []
        for start in range(0, len(prompts), _PART):
            if start and self._closed:
                raise _closed()
            if all(call.future.cancelled() for call in group):
                raise _NobodyWaitsError
            routes += self._route(prompts[start : start + _PART], group[0].base_model, group[0].routing)
        assert len(routes) == len(prompts), "one route for each prompt"
        return routes

    def _all(self) -> list[_Call]:
        """Everything that waits, which then waits no more."""
        left = [call for calls in self._waiting.values() for call in calls]
        self._waiting.clear()
        return left


class _NobodyWaitsError(Exception):
    """Every caller of a group took its call back."""


def _like(error: RegistryError) -> RegistryError:
    """The same error for one caller: raising writes into it, so that several cannot share one."""
    like = type(error).__new__(type(error), *error.args)
    like.__dict__.update(error.__dict__)
    like.__cause__ = error.__cause__
    return like.with_traceback(error.__traceback__)


def _bearable(error: Exception) -> Exception:
    """asyncio's futures refuse StopIteration, and whoever awaits them would wait for ever."""
    if not isinstance(error, StopIteration):
        return error
    told = RuntimeError("routing raised StopIteration")
    told.__cause__ = error
    return told


def _closed() -> EngineClosedError:
    return EngineClosedError("this hub was closed; open it again")


def _too_late(timeout_s: float | None) -> DeadlineExceededError:
    return DeadlineExceededError(f"the prompts had no routes within timeout_s={timeout_s}; give more time, or fewer")
