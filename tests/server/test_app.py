"""The rest of the app: health, readiness, metrics, the door, and everything that is no route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_hub_sdk.errors import ConfigurationError, UnknownStrategyError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.server.app import create_app
from lora_hub_sdk.server.running import Server
from lora_hub_sdk.server.settings import ServerSettings
from tests.encoders import Hashing
from tests.server.serving import Served, serving


def test_health_and_readiness_are_open(served: Served) -> None:
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}


def test_metrics_count_requests_by_route_and_not_by_what_was_typed(served: Served) -> None:
    httpx.get(f"{served.url}/v1/adapters/made-up-name")
    httpx.get(f"{served.url}/no/such/route")
    page = httpx.get(f"{served.url}/metrics").text
    assert 'lora_hub_http_requests_total{route="/v1/adapters/{name:path}",status="404"}' in page
    assert "made-up-name" not in page
    assert "/no/such" not in page
    assert "lora_hub_engine_" in page


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/adapters", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "/docs", 404),
        ("POST", "/health", 405),
    ],
)
def test_what_is_no_route_is_told_in_the_same_form(served: Served, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, served.url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_without_keys_nobody_comes_by_a_foreign_name(served: Served) -> None:
    """As a page would whose own name was made to mean this machine."""
    body = {"model": "base", "prompt": "hi", "max_tokens": 1}
    for host, status in (
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("", 403),
        ("localhost:1", 200),
        ("[::1]", 200),
    ):
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers={"host": host})
        assert answer.status_code == status, host


def test_a_mistake_of_the_server_is_told_without_its_insides(
    filled: LoraHub, served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the secret is in /root/secret")

    monkeypatch.setattr(filled, "search", broken)
    answer = httpx.post(f"{served.url}/v1/adapters/search", json={"query": "hi"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


def test_keys_are_asked_for_unless_told_otherwise(filled: LoraHub, chat_base: Path) -> None:
    with serving(filled, base_model=str(chat_base), auth="keys") as served:
        for path in ("/v1/models", "/v1/adapters", "/metrics"):
            answer = httpx.get(served.url + path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "hi"}).status_code == 401
        assert httpx.get(f"{served.url}/ready").status_code == 200


def test_a_share_is_given_back_after_every_kind_of_answer(filled: LoraHub, chat_base: Path) -> None:
    with serving(filled, base_model=str(chat_base), concurrent_per_key=1) as served, httpx.Client(timeout=60) as client:
        body: dict[str, Any] = {"prompt": "hi", "max_tokens": 2}
        for fields in ({}, {"model": "nobody"}, {"k": 0}, {"stream": True}, {"stream": True, "model": "nobody"}, {}):
            answer = client.post(f"{served.url}/v1/completions", json={**body, **fields})
            assert answer.status_code != 429, fields
        assert client.get(f"{served.url}/v1/adapters/nobody").status_code == 404
        assert client.get(f"{served.url}/v1/models").status_code == 200


def test_who_asks_too_often_is_told_when_to_come_again(filled: LoraHub, chat_base: Path) -> None:
    with serving(filled, base_model=str(chat_base), requests_per_minute=2) as served:
        statuses = [httpx.get(f"{served.url}/v1/models") for _ in range(3)]
        assert [answer.status_code for answer in statuses] == [200, 200, 429]
        assert 1 <= int(statuses[-1].headers["retry-after"]) <= 60
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_without_keys_it_listens_on_this_machine_only() -> None:
    with LoraHub(":memory:", encoder=Hashing("one"), offline=True) as hub:
        app = create_app(hub, ServerSettings(base_model=None, auth="none"))
        for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
            with pytest.raises(ConfigurationError, match="keys"):
                Server(app, host)
        Server(app, "localhost")
        Server(create_app(hub, ServerSettings(base_model=None, auth="none", open_to_all=True)), "0.0.0.0")
        Server(create_app(hub, ServerSettings(base_model=None)), "0.0.0.0")


@pytest.mark.parametrize(
    "settings",
    [{"auth": "maybe"}, {"timeout_s": 0}, {"max_prompts": 0}, {"k": 0}, {"weights": "x"}, {"template": "x"}],
    ids=str,
)
def test_settings_that_no_request_could_use_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ServerSettings(**settings)
    with pytest.raises(UnknownStrategyError):
        ServerSettings(strategy="luck")


def test_the_document_tells_of_every_body(served: Served) -> None:
    document = httpx.get(f"{served.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/adapters", "/v1/adapters/search"):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema["$ref"].rpartition("/")[2] in schemas
    references = {text for text in str(document).split("'") if text.startswith("#/components/")}
    assert all(reference.rpartition("/")[2] in schemas for reference in references)
