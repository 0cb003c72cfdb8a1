"""Clients that go away, and a server that is told to stop."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from tests.encoders import Hashing
from tests.server.serving import serving
from tests.support import endless_base

#: Would take minutes; whoever asks for it gives it up.
ENDLESS = 30_000


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoraHub, Path]]:
    """A hub whose answers never end by themselves."""
    folder = tmp_path_factory.mktemp("talker")
    base = endless_base(folder / "wide")
    with LoraHub(folder / "hub.db", encoder=Hashing("one"), offline=True) as hub:
        hub.register(tiny_adapter(folder / "maths", base), samples=["What is 12 + 30?"])
        yield hub, base


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def rows(hub: LoraHub) -> int:
    """Of all engines, waiting ones too."""
    return sum(stats.running + stats.waiting for stats in hub.stats())


def asked(stream: bool, chat: bool, **more: Any) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": "maths", "max_tokens": ENDLESS, "stream": stream, **more}
    if chat:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "talk"}]}
    return "/v1/completions", {"prompt": "talk", **body}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("chat", [False, True], ids=["prompt", "chat"])
def test_a_client_that_hangs_up_frees_its_row(talker: tuple[LoraHub, Path], stream: bool, chat: bool) -> None:
    hub, base = talker
    with serving(hub, base_model=str(base), max_new_tokens=ENDLESS, concurrent_per_key=1) as served:
        path, body = asked(stream, chat)
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}"
        )
        with socket.create_connection(("127.0.0.1", served.server.port)) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + raw)
            until(lambda: rows(hub) == 1, "the request was not begun")
            if stream:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: rows(hub) == 0, "its row is still decoded")
        # The share is free too, and the server serves.
        until(lambda: httpx.get(f"{served.url}/v1/models").status_code == 200, "its share was not given back")


def test_several_streams_of_one_request_end_together(talker: tuple[LoraHub, Path]) -> None:
    hub, base = talker
    with serving(hub, base_model=str(base), max_new_tokens=ENDLESS) as served:
        path, body = asked(True, False, prompt=["talk", "speak", "say"])
        with httpx.stream("POST", served.url + path, json=body, timeout=60) as answer:
            assert answer.status_code == 200
            until(lambda: rows(hub) == 3, "not all of them were begun")
        until(lambda: rows(hub) == 0, "a row is still decoded")


def test_an_answer_that_takes_too_long_is_given_up(talker: tuple[LoraHub, Path]) -> None:
    hub, base = talker
    with serving(hub, base_model=str(base), max_new_tokens=ENDLESS, timeout_s=0.5) as served:
        path, body = asked(False, True)
        late = httpx.post(served.url + path, json=body, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        path, body = asked(True, True)
        with httpx.stream("POST", served.url + path, json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        until(lambda: rows(hub) == 0, "a row is still decoded")


def test_a_server_that_stops_finishes_what_runs_and_begins_nothing(talker: tuple[LoraHub, Path]) -> None:
    hub, base = talker
    with serving(hub, base_model=str(base), max_new_tokens=ENDLESS, drain_s=60) as served:
        path, body = asked(True, False, max_tokens=400)
        with httpx.stream("POST", served.url + path, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            other = httpx.Client(base_url=served.url, timeout=60)
            assert other.get("/ready").status_code == 200
            served.house.draining = True
            assert other.get("/ready").status_code == 503
            refused = other.post(path, json=asked(False, False, max_tokens=1)[1])
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            served.server.handle_exit(15, None)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        other.close()


def test_what_does_not_end_in_time_is_given_up_when_the_server_stops(talker: tuple[LoraHub, Path]) -> None:
    hub, base = talker
    with serving(hub, base_model=str(base), max_new_tokens=ENDLESS, drain_s=0.1) as served:
        path, body = asked(True, False)
        broken: list[Exception] = []

        def read() -> None:
            try:
                httpx.post(served.url + path, json=body, timeout=60)
            except httpx.HTTPError as error:
                broken.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: rows(hub) == 1, "the request was not begun")
        served.server.handle_exit(15, None)
        reader.join(60)
        assert broken
        until(lambda: rows(hub) == 0, "its row is still decoded")
