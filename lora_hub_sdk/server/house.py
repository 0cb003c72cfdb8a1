"""What all requests of one server share, and the door through which each of them comes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

from starlette.requests import Request

from lora_hub_sdk.errors import LoraHubError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.registry.api_keys import RIGHTS, Right
from lora_hub_sdk.server.auth import Caller, Doorkeeper
from lora_hub_sdk.server.choosing import Chooser
from lora_hub_sdk.server.limits import Pass, Turnstile
from lora_hub_sdk.server.metrics import ServerMetrics
from lora_hub_sdk.server.refusals import Refusal, Refused
from lora_hub_sdk.server.settings import ServerSettings, is_loopback

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
#: What anybody may do where everybody is let in from everywhere.
_OPEN_RIGHTS: Final[tuple[Right, ...]] = ("generate", "read")


class House:
    """One server's hub, its door, and its threads.

    Args:
        hub: stays its owner's, who closes it.
    """

    def __init__(self, hub: LoraHub, settings: ServerSettings) -> None:
        self.hub = hub
        self.settings = settings
        self.model_settings = settings.model
        self.chooser = Chooser(settings)
        self.metrics = ServerMetrics()
        #: Nothing new is begun.
        self.draining = False
        self._doorkeeper = Doorkeeper(
            hub.keys if settings.auth == "keys" else None,
            namespace=settings.namespace,
            rights=_OPEN_RIGHTS if settings.open_to_all else RIGHTS,
        )
        self._turnstile = Turnstile(
            requests_per_minute=settings.requests_per_minute, concurrent=settings.concurrent_per_key
        )
        self._only_here = settings.auth == "none" and not settings.open_to_all
        # Registering takes minutes, so it has threads of its own.
        self._lookups = ThreadPoolExecutor(4, "lora-hub-http")
        self._long = ThreadPoolExecutor(2, "lora-hub-http-register")
        self._new_tokens = settings.new_tokens
        #: Seconds since 1970.
        self.began: Final = int(time.time())

    async def admit(self, request: Request, right: Right) -> tuple[Caller, Pass]:
        """Who asks, and the pass that has to be given back when the request ends.

        Raises:
            UnauthorizedError, MissingRightError, TooManyRequestsError: the caller is not let in.
            Refused: the server is stopping; or a page of another site asks through a browser of this machine.
        """
        if self.draining:
            raise Refused(
                Refusal(503, "the server is stopping; ask another", "server_error", "draining", retry_after_s=5)
            )
        if self._only_here and not is_loopback(_host(request)):
            # A name that somebody else made an alias of this machine, so that a browser takes our answers for theirs.
            raise Refused(
                Refusal(403, "without API keys, ask for this server as localhost or 127.0.0.1", code="foreign_host")
            )
        caller = await self._doorkeeper.aadmit(request.headers.get("authorization"))
        caller.require(right)
        return caller, self._turnstile.enter(caller.id)

    async def look_up(self, call: Callable[[], _T]) -> _T:
        """What asks the database, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._lookups, call)

    async def work(self, call: Callable[[], _T]) -> _T:
        """What may take minutes."""
        return await asyncio.get_running_loop().run_in_executor(self._long, call)

    @property
    def new_tokens(self) -> int:
        """The longest answer where a request does not say: at most half of the base model's context."""
        return self._new_tokens

    def warm_up(self) -> None:
        """Load the base model and the encoder, unless they are loaded.

        Raises:
            LoraHubError: they cannot be.
        """
        base = self.settings.base_model
        if base is not None:
            self._new_tokens = min(self.settings.new_tokens, max(self.hub.context(base) // 2, 1))
            self.hub.engine(base, self.model_settings)
        _ = self.hub.encoder

    async def warm_up_aside(self) -> None:
        """As ``warm_up``, in a thread; what goes wrong is for the log, and for each request."""
        try:
            await self.work(self.warm_up)
        except LoraHubError:
            _log.exception("the base model or the encoder could not be loaded; requests will try again")

    def is_ready(self) -> bool:
        """Whether a request would be answered without waiting for the base model."""
        if self.draining:
            return False
        base = self.settings.base_model
        if base is None:
            return True
        with suppress(LoraHubError):
            return bool(self.hub.loaded_bases(self.model_settings))
        return False

    def close(self) -> None:
        """Give the threads back; the hub stays open."""
        self._lookups.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)


def house_of(request: Request) -> House:
    """The house that a request came to."""
    house: House = request.app.state.house
    return house


def _host(request: Request) -> str:
    """Without the port, and without the brackets of IPv6."""
    host = request.headers.get("host", "")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
