"""One call for answers: its prompts, how each of them shall be answered, and how long that may take."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from lora_hub_sdk.composition.router import check_base
from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.errors import ConfigurationError, DeadlineExceededError
from lora_hub_sdk.messages import Prompt, text_of
from lora_hub_sdk.retriever.query import check_prompts
from lora_hub_sdk.types import Route, Routing, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.engine.prompt import Overflow, Template
    from lora_hub_sdk.engine.request import Request

_T = TypeVar("_T", Routing, Sampling, float | None)
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Call:
    """Prompts for one base model, or each for that of its nearest adapter where ``base_model`` is None.

    ``routings``, ``samplings`` and ``timeouts_s`` have one value for each of them. ``client`` is whom all of them count
    for where an engine's callers take turns; by default a call counts for itself.
    """

    prompts: Sequence[Prompt]
    base_model: str | os.PathLike[str] | None
    routings: Sequence[Routing]
    samplings: Sequence[Sampling]
    timeouts_s: Sequence[float | None]
    template: Template
    overflow: Overflow
    client: str | None = None
    began: float = field(default_factory=monotonic)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        base_model: str | os.PathLike[str] | None,
        routing: Routing | Sequence[Routing] | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        timeout_s: float | Sequence[float | None] | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        client: str | None = None,
    ) -> Call:
        """A call whose options are given once for all prompts, or once for each.

        Raises:
            ConfigurationError: a list of options of another length, or options that make no sense.
            UnknownStrategyError: a routing's.
            EmptyPromptError: a prompt without text.
        """
        check_prompts(prompts if isinstance(prompts, str) else [text_of(prompt) for prompt in prompts])
        count = len(prompts)
        timeouts = _each("timeout_s", timeout_s, count, None, (float, int, type(None)))
        for seconds in timeouts:
            check_timeout(seconds)
        call = cls(
            prompts,
            base_model,
            _each("routing", routing, count, Routing(), (Routing,)),
            _each("sampling", sampling, count, Sampling(), (Sampling,)),
            timeouts,
            template,
            overflow,
            client,
        )
        for asked, _ in call.groups():
            check_routing(asked)
            check_base(base_model, asked)
        return call

    def left_s(self) -> float | None:
        """Seconds until the first of its prompts is too late, at least 0; None where none ever is."""
        timeouts = [seconds for seconds in self.timeouts_s if seconds is not None]
        return max(self.began + min(timeouts) - monotonic(), 0.0) if timeouts else None

    def groups(self) -> list[tuple[Routing, list[int]]]:
        """The places of the prompts that are routed alike."""
        groups: dict[str, tuple[Routing, list[int]]] = {}
        for place, routing in enumerate(self.routings):
            # Not by the routing itself: it may hold lists, and 1 equals True.
            groups.setdefault(repr(routing), (routing, []))[1].append(place)
        return list(groups.values())

    def requests(self, routes: Sequence[Route], places: Sequence[int] | None = None) -> list[Request]:
        """What an engine is asked, once every prompt has its route; all prompts, or those of some places.

        Raises:
            DeadlineExceededError: no time is left.
        """
        from lora_hub_sdk.engine.request import Request

        passed = monotonic() - self.began
        late = [seconds for seconds in self.timeouts_s if seconds is not None and seconds <= passed]
        if late:
            raise DeadlineExceededError(
                f"finding the adapters and loading the base model took all of timeout_s={late[0]}; give more time"
            )
        return [
            Request(
                self.prompts[place],
                routes[place],
                self.samplings[place],
                self.template,
                self.overflow,
                None if (seconds := self.timeouts_s[place]) is None else seconds - passed,
                self.client,
            )
            for place in (range(len(self.prompts)) if places is None else places)
        ]


def places_by_base(routes: Sequence[Route]) -> dict[str, list[int]]:
    """The places of the routes of each base model."""
    places: dict[str, list[int]] = {}
    for place, route in enumerate(routes):
        places.setdefault(route.base_model, []).append(place)
    return places


def run_aside(main: Callable[[], Coroutine[Any, Any, _R]]) -> _R:
    """Run a coroutine on an event loop of its own, in a thread of its own, since this thread's may be running.

    It is cancelled where this thread is interrupted.
    """
    cancels: list[Callable[[], object]] = []

    async def watched() -> _R:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        cancels.append(lambda: loop.call_soon_threadsafe(task.cancel))
        return await main()

    with ThreadPoolExecutor(1, "lora-hub-bases") as aside:
        future = aside.submit(asyncio.run, watched())
        try:
            return future.result()
        finally:
            with suppress(RuntimeError):  # the loop has just ended
                for cancel in cancels if not future.done() else ():
                    cancel()


async def all_or_none(coroutines: Iterable[Coroutine[Any, Any, _R]]) -> list[_R]:
    """What they return, in their order; where one fails the others are cancelled, and its error is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_timeout(seconds: float | None) -> None:
    """Refuse a time in which nothing can happen.

    Raises:
        ConfigurationError: seconds that are not above 0.
    """
    if seconds is not None and not 0 < seconds <= threading.TIMEOUT_MAX:  # not-a-number passes no comparison
        raise ConfigurationError(f"timeout_s={seconds!r}: expected seconds above 0, or None for no end")


def _each(name: str, given: _T | Sequence[_T] | None, count: int, default: _T, kinds: tuple[type, ...]) -> list[_T]:
    """``given`` for each of ``count`` prompts."""
    values: list[Any] = list(given) if isinstance(given, Sequence) else [default if given is None else given] * count
    for value in values:
        if not isinstance(value, kinds):
            raise ConfigurationError(f"{name}: expected {kinds[0].__name__}, or one for each prompt; found {value!r}")
    if len(values) != count:
        raise ConfigurationError(
            f"{name} has {len(values)} values for {count} prompts; give one for all of them, or one for each"
        )
    return values
