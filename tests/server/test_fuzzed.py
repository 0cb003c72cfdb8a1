"""Schemathesis makes requests from the app's own document, good and bad ones: none is answered with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import LocalHub
from tests.encoders import Hashing
from tests.server.conftest import fill
from tests.server.serving import Served, serving

#: For each route and kind of request, good and bad; and over all of them together.
_FEW, _MANY = 4, 2000


@pytest.fixture(scope="module")
def fuzzed(chat_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of its own, as adapters may come and go; its Hub has none of the repositories that are asked for."""
    folder = tmp_path_factory.mktemp("fuzzed")
    with (
        LocalHub() as remote,
        LoraHub(folder / "hub.db", encoder=Hashing("one"), endpoint=remote.url, cache_dir=folder / "cache") as hub,
    ):
        fill(hub, chat_base, folder)
        with serving(hub, base_model=str(chat_base), new_tokens=4, max_new_tokens=16, max_prompts=4) as served:
            yield served


def send(served: Served, kinds: list[Any], cases: int) -> int:
    """So many requests of every kind; returns how many were sent."""
    sent = 0
    for number, kind in enumerate(kinds):

        @seed(number)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=kind)
        def run(case: Any) -> None:
            nonlocal sent
            sent += 1
            if sent % 2 and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "auto"  # no made-up name is an adapter's
            case.call_and_validate(base_url=served.url, checks=[not_a_server_error], timeout=120)

        run()
    return sent


def kinds_of(served: Served, *, with_body: bool = False) -> list[st.SearchStrategy[Any]]:
    """Good requests of each route, and bad ones where anything can be wrong."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    found: Any = schema.get_all_operations()
    operations: list[Any] = [one.ok() for one in found]
    assert len(operations) >= 12
    told = [one for one in operations if one.body or one.query]
    return [
        operation.as_strategy(generation_mode=mode)
        for mode, chosen in ((GenerationMode.POSITIVE, operations), (GenerationMode.NEGATIVE, told))
        for operation in chosen
        if operation.body or not with_body
    ]


def test_made_up_requests_never_break_the_server(fuzzed: Served) -> None:
    kinds = kinds_of(fuzzed)
    assert send(fuzzed, kinds, _FEW) >= len(kinds)


@pytest.mark.slow
def test_2000_made_up_requests_never_break_the_server(fuzzed: Served) -> None:
    # Few routes have bodies, and those have most to be wrong.
    bodies = kinds_of(fuzzed, with_body=True)
    sent = send(fuzzed, kinds_of(fuzzed), 30) + send(fuzzed, bodies, _MANY // len(bodies))
    assert sent >= _MANY
    page = httpx.get(f"{fuzzed.url}/metrics").text
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/adapters/search"):
        assert f'route="{route}",status="200"' in page, "nothing that was made up came as far as an answer"
