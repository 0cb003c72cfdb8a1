"""The indexes that one process has open: one for each encoder that is, or was just now, in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from lora_hub_sdk.registry.follower import Follower

#: The active encoder's index and the one before it, which the searches use that began before a switch.
_KEPT: Final = 2


class Followers:
    """Followers by their encoder's fingerprint, opened when they are first asked for. Thread-safe.

    Args:
        follow: makes the follower of an encoder.
    """

    def __init__(self, follow: Callable[[str], Follower]) -> None:
        self._follow = follow
        self._lock = threading.Lock()
        # In the order of their last use.
        self._open: dict[str, Follower] = {}
        self._users: dict[str, int] = {}

    @contextmanager
    def lend(self, encoder: str) -> Iterator[Follower]:
        """The follower of an encoder; it stays open until it is given back."""
        with self._lock:
            follower = self._open.pop(encoder, None) or self._follow(encoder)
            self._open[encoder] = follower
            self._users[encoder] = self._users.get(encoder, 0) + 1
        try:
            yield follower
        finally:
            with self._lock:
                self._users[encoder] -= 1
                surplus = self._surplus()
            for each in surplus:
                each.close()

    def close(self) -> None:
        """Release every index; what is used afterwards says that it was closed."""
        with self._lock:
            followers = list(self._open.values())
        for follower in followers:
            follower.close()

    def _surplus(self) -> list[Follower]:
        """Take out those that nobody uses, the longest unused first, while there are too many."""
        idle = [encoder for encoder in self._open if not self._users[encoder]]
        return [self._open.pop(encoder) for encoder in idle[: max(0, len(self._open) - _KEPT)]]
