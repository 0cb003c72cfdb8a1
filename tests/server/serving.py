"""A server of ours behind a real socket of this machine, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.server.app import create_app
from lora_hub_sdk.server.house import House
from lora_hub_sdk.server.running import Server
from lora_hub_sdk.server.settings import ServerSettings


class Served:
    """Where it listens, and what its requests share."""

    def __init__(self, server: Server, house: House) -> None:
        self.server = server
        self.house = house
        self.url = f"http://127.0.0.1:{server.port}"


@contextmanager
def serving(hub: LoraHub, **settings: Any) -> Iterator[Served]:
    """Up and ready until the block ends."""
    app = create_app(hub, ServerSettings(**{"auth": "none", **settings}))
    server = Server(app, port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    house: House = app.state.house
    try:
        until = time.monotonic() + 60
        while not (server.started and house.is_ready()):
            assert thread.is_alive(), "the server ended before it was up"
            assert time.monotonic() < until, "the server did not come up"
            time.sleep(0.01)
        yield Served(server, house)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"
