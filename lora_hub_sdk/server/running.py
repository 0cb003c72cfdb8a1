"""Running an app with uvicorn, and ending it without cutting anybody short."""

from __future__ import annotations

import math
from types import FrameType
from typing import Final

import uvicorn
from fastapi import FastAPI

from lora_hub_sdk.server.house import House

#: Connections that wait to be taken, and seconds that an idle one is kept.
_BACKLOG: Final = 2048
_KEEP_ALIVE_S: Final = 75


class Server(uvicorn.Server):
    """One process, one event loop: the engines' threads are in it.

    On SIGTERM or SIGINT it takes no more requests, lets those that run finish for ``drain_s`` seconds, and gives up the
    rest; a second signal gives them up at once.

    Args:
        app: of ``create_app``.
        port: 0 takes one that is free.
        access_log: a line for each request.

    Raises:
        ConfigurationError: a host that strangers can reach, without keys.
    """

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000, *, access_log: bool = False) -> None:
        self._house: House = app.state.house
        settings = self._house.settings
        settings.check_host(host)
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                access_log=access_log,
                log_level="info",
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.drain_s),
                # Nobody's word is taken for where a request comes from.
                proxy_headers=False,
            )
        )

    @property
    def port(self) -> int:
        """The port that it listens on, once it has started."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; called by the signal.

        uvicorn's own would raise the signal again at the end, and so kill the process before the hub is closed.
        """
        self.force_exit = self.should_exit
        self.should_exit = self._house.draining = True
