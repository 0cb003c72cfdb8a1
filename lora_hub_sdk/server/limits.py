"""How much each caller may ask: requests a minute, and requests at one time."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.errors import ConfigurationError, TooManyRequestsError

#: Sums of small refills miss a whole token by less than this.
_ROUNDING: Final = 1e-9


@dataclass(slots=True)
class _Share:
    """What a caller has left: a bucket that a minute fills, and how many of its requests run."""

    tokens: float
    at: float
    running: int = 0


class Turnstile:
    """Counts each caller's requests. Thread-safe, and pure arithmetic: nothing waits here.

    Args:
        requests_per_minute: how many a caller may begin in a minute; after a quiet minute all of them at once. None
            for any number.
        concurrent: how many of a caller's requests may run at one time; None for any number.
        most_callers: how many are remembered. Of more, those that have nothing running and were quiet longest are
            forgotten, and begin anew.
        clock: monotonic seconds.

    Raises:
        ConfigurationError: a number below 1.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        concurrent: int | None = None,
        most_callers: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        named = {"requests_per_minute": requests_per_minute, "concurrent": concurrent, "most_callers": most_callers}
        for name, number in named.items():
            if number is not None and number < 1:
                raise ConfigurationError(f"{name}={number}: expected 1 or more, or None for no limit")
        self._per_minute = requests_per_minute
        self._concurrent = concurrent
        self._most_callers = most_callers
        self._clock = clock
        self._lock = threading.Lock()
        self._shares: OrderedDict[str, _Share] = OrderedDict()

    def enter(self, caller: str) -> Pass:
        """Let a request begin; the pass must be given back when it ends, however it ends.

        Raises:
            TooManyRequestsError: the caller has no room now; the refused request counts for nothing.
        """
        with self._lock:
            share = self._share_of(caller)
            if self._concurrent is not None and share.running >= self._concurrent:
                raise TooManyRequestsError(
                    f"{share.running} requests of this caller run, {self._concurrent} may at one time", retry_after_s=1
                )
            if self._per_minute is not None:
                if share.tokens < 1 - _ROUNDING:
                    raise TooManyRequestsError(
                        f"this caller may begin {self._per_minute} requests a minute",
                        retry_after_s=max(1, math.ceil((1 - share.tokens) * 60 / self._per_minute)),
                    )
                share.tokens -= 1
            share.running += 1
        return Pass(self, caller)

    def running(self, caller: str) -> int:
        """How many of a caller's requests run."""
        with self._lock:
            share = self._shares.get(caller)
            return 0 if share is None else share.running

    def _leave(self, caller: str) -> None:
        with self._lock:
            self._shares[caller].running -= 1  # never forgotten while something of it runs

    def _share_of(self, caller: str) -> _Share:
        now, full = self._clock(), float(self._per_minute or 0)
        share = self._shares.setdefault(caller, _Share(full, now))
        self._shares.move_to_end(caller)
        share.tokens, share.at = min(full, share.tokens + (now - share.at) * full / 60), now
        if len(self._shares) > self._most_callers:
            quiet = next((name for name, one in self._shares.items() if not one.running and one is not share), None)
            if quiet is not None:
                del self._shares[quiet]
        return share


class Pass:
    """A request that runs. Giving it back twice counts once; as a context manager it is given back at the end."""

    __slots__ = ("_caller", "_turnstile")

    def __init__(self, turnstile: Turnstile, caller: str) -> None:
        self._turnstile: Turnstile | None = turnstile
        self._caller = caller

    def leave(self) -> None:
        """Give the pass back."""
        turnstile, self._turnstile = self._turnstile, None
        if turnstile is not None:
            turnstile._leave(self._caller)

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
