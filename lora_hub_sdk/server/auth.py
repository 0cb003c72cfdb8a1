"""Who asks: from the header of a request to the namespace and the rights of its key."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from lora_hub_sdk.errors import MissingRightError, UnauthorizedError
from lora_hub_sdk.registry.api_keys import RIGHTS, ApiKey, ApiKeys, Right, secret_digest
from lora_hub_sdk.types import DEFAULT_NAMESPACE

_BEARER: Final = re.compile(r"bearer +([!-~]+) *", re.IGNORECASE)
#: Seconds for which a key is not looked up again: as long may one work that was just revoked.
_KEPT_S: Final = 2.0
_MOST_KEPT: Final = 4096


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever a request comes from. ``id`` tells one caller from another, for limits and logs: the key's name."""

    id: str
    namespace: str
    rights: frozenset[Right]

    def require(self, right: Right) -> None:
        """Refuse what the caller may not do.

        Raises:
            MissingRightError: it has other rights.
        """
        if right not in self.rights:
            raise MissingRightError(right, self.rights)


class Doorkeeper:
    """Tells callers by their API keys. Thread-safe.

    Secrets are not kept in memory, only their hashes, and those of valid keys alone.

    Args:
        keys: None lets everybody in, whatever the header, as one caller.
        namespace: of that one caller; a key brings its own.
        rights: of that one caller.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        keys: ApiKeys | None,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        rights: Iterable[Right] = RIGHTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._everybody = Caller("everybody", namespace, frozenset(rights))
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[ApiKey, float]] = OrderedDict()

    def admit(self, authorization: str | None) -> Caller:
        """The caller with this ``Authorization`` header; now and then the database is asked.

        Raises:
            UnauthorizedError: no key, or one that is unknown, revoked or expired; which of them is not told.
            StorageError: the database does not answer.
        """
        if self._keys is None:
            return self._everybody
        secret = _secret_of(authorization)
        return self._recalled(secret) or self._looked_up(self._keys, secret)

    async def aadmit(self, authorization: str | None) -> Caller:
        """As ``admit``, without ever blocking the event loop."""
        if self._keys is None:
            return self._everybody
        secret = _secret_of(authorization)
        known = self._recalled(secret)
        return known if known is not None else await asyncio.to_thread(self._looked_up, self._keys, secret)

    def _recalled(self, secret: str) -> Caller | None:
        with self._lock:
            key, until = self._kept.get(secret_digest(secret), (None, 0.0))
        return _caller(key) if key is not None and self._clock() < until and key.is_valid() else None

    def _looked_up(self, keys: ApiKeys, secret: str) -> Caller:
        # Taken before the look-up, so that a slow one makes no key last longer.
        until, digest = self._clock() + _KEPT_S, secret_digest(secret)
        key = keys.find(secret)
        with self._lock:
            self._kept.pop(digest, None)
            if key is not None:
                self._kept[digest] = (key, until)
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
        if key is None:
            raise UnauthorizedError("the API key is unknown, revoked or expired; ask the server's owner for another")
        return _caller(key)


def _secret_of(authorization: str | None) -> str:
    found = _BEARER.fullmatch(authorization or "")
    if found is None:
        raise UnauthorizedError("no API key was given; send one in the header 'Authorization: Bearer lh_...'")
    return found[1]


def _caller(key: ApiKey) -> Caller:
    return Caller(key.name, key.namespace, frozenset(key.rights))
