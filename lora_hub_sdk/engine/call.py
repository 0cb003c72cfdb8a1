"""One call for answers: its prompts, how each of them shall be answered, and how long that may take."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.errors import ConfigurationError, DeadlineExceededError
from lora_hub_sdk.retriever.query import check_prompts
from lora_hub_sdk.types import Route, Routing, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.engine.prompt import Overflow, Template
    from lora_hub_sdk.engine.request import Request

_T = TypeVar("_T", Routing, Sampling, float | None)


@dataclass(frozen=True, slots=True)
class Call:
    """Prompts for one base model. ``routings``, ``samplings`` and ``timeouts_s`` have one value for each of them."""

    prompts: Sequence[str]
    base_model: str | os.PathLike[str]
    routings: Sequence[Routing]
    samplings: Sequence[Sampling]
    timeouts_s: Sequence[float | None]
    template: Template
    overflow: Overflow
    began: float = field(default_factory=monotonic)

    @classmethod
    def of(
        cls,
        prompts: Sequence[str],
        base_model: str | os.PathLike[str],
        routing: Routing | Sequence[Routing] | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        timeout_s: float | Sequence[float | None] | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
    ) -> Call:
        """A call whose options are given once for all prompts, or once for each.

        Raises:
            ConfigurationError: a list of options of another length, or options that make no sense.
            UnknownStrategyError: a routing's.
            EmptyPromptError: a prompt without text.
        """
        check_prompts(prompts)
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
        )
        for asked, _ in call.groups():
            check_routing(asked)
        return call

    @property
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

    def requests(self, routes: Sequence[Route]) -> list[Request]:
        """What an engine is asked, once every prompt has its route.

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
                prompt, route, sampling, self.template, self.overflow, None if seconds is None else seconds - passed
            )
            for prompt, route, sampling, seconds in zip(
                self.prompts, routes, self.samplings, self.timeouts_s, strict=True
            )
        ]


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
