"""Bodies that are none: every one of them is a 400 that names the field, and never a fault of the server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.serving import Served

COMPLETIONS, CHAT, SEARCH = "/v1/completions", "/v1/chat/completions", "/v1/adapters/search"
JSON = {"content-type": "application/json"}


def told(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, SEARCH])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'"text"',
        b"\xff\xfe{}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800", "query": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"metadata":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
        b'{"prompt": NaN, "query": NaN, "messages": NaN}',
        b'{"k": 1e400, "prompt": "a", "query": "a", "messages": [{"role": "user", "content": "a"}]}',
        b'{"k": ' + b"9" * 10_000 + b', "prompt": "a", "query": "a", "messages": [{"role": "user", "content": "a"}]}',
        b"\0",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_no_body_is_refused(served: Served, path: str, body: bytes) -> None:
    answer = httpx.post(served.url + path, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert told(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 3),
        ("model", ""),
        ("model", "a\0b"),
        ("model", "auto:guessing"),
        ("prompt", []),
        ("prompt", [1, 2, 3]),
        ("prompt", ""),
        ("prompt", ["a", " "]),
        ("max_tokens", 0),
        ("max_tokens", "3"),
        ("max_tokens", 2.5),
        ("max_tokens", 10**30),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", 3),
        ("top_p", 0),
        ("top_k", -1),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 257),
        ("k", 0),
        ("k", 10_000),
        ("weights", "heavy"),
        ("strategy", "luck"),
        ("min_score", 2),
        ("adapters", []),
        ("adapters", ["a"] * 300),
        ("exclude", ["a\0"]),
        ("tags", "maths"),
        ("template", "own"),
        ("stream", "yes"),
        ("n", 2),
        ("best_of", 2),
        ("echo", True),
        ("logprobs", 1),
        ("suffix", "end"),
        ("presence_penalty", 0.5),
        ("logit_bias", {"50": 1}),
        ("functions", []),
        ("nonsense", None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_field_that_cannot_be_honoured_is_named(served: Served, field: str, value: Any) -> None:
    body = {"model": "auto", "prompt": "What is 1 + 1?", "max_tokens": 1, field: value}
    answer = httpx.post(served.url + COMPLETIONS, json=body)
    assert answer.status_code == 400, answer.text
    error = told(answer)
    assert error["param"] == field or field in error["message"] or field in ("prompt", "model", "strategy"), error


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "suffix": None, "presence_penalty": 0.0},
        {"frequency_penalty": 0, "logit_bias": {}, "user": "me", "metadata": {"a": "b"}, "store": False},
        {"stop": ["\n", "END"], "seed": -(2**63), "temperature": 1e-300, "top_p": 0.5},
        {"temperature": 2, "top_p": 1e-12, "top_k": 1, "seed": 2**63 - 1},
        {"prompt": "null byte \0 in the midst"},
        {"min_score": -1, "rerank": False, "exclude": ["nobody"], "tags": []},
    ],
    ids=lambda fields: " ".join(fields)[:40],
)
def test_harmless_fields_are_taken(served: Served, fields: dict[str, Any]) -> None:
    body = {"model": "auto", "prompt": "What is 1 + 1?", "max_tokens": 3, **fields}
    answer = httpx.post(served.url + COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "function", "name": "f", "content": "x"}]},
        {"messages": [{"role": "user", "content": " "}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "code_interpreter"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "none_such"}}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        {"top_logprobs": 2},
        {"modalities": ["audio"]},
        {"search_by": "luck"},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_a_chat_that_makes_no_sense_is_refused(served: Served, fields: dict[str, Any]) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}
    answer = httpx.post(served.url + CHAT, json=body)
    assert answer.status_code == 400, answer.text
    told(answer)


def test_a_body_beyond_the_bound_is_refused_while_it_is_read(served: Served) -> None:
    limit = served.house.settings.max_body_bytes
    stated = httpx.post(served.url + COMPLETIONS, content=b" " * (limit + 1), headers=JSON)
    assert stated.status_code == 413
    sent = 0

    def chunks() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 16
            yield b" " * (1 << 16)

    try:
        unstated = httpx.post(served.url + COMPLETIONS, content=chunks(), headers=JSON)
        assert unstated.status_code == 413
    except httpx.WriteError:  # the server closed the connection before the whole body was sent
        pass
    assert sent < 1000 << 16


def test_only_json_is_read_so_that_no_page_can_ask_through_a_browser(served: Served) -> None:
    body = json.dumps({"prompt": "hi", "max_tokens": 1}).encode()
    assert httpx.post(served.url + COMPLETIONS, content=body, headers={"content-type": "text/plain"}).status_code == 415
    named = {"content-type": "Application/JSON; charset=utf-8"}
    assert httpx.post(served.url + COMPLETIONS, content=body, headers=named).status_code == 200


def test_a_prompt_list_has_a_bound(served: Served) -> None:
    most = served.house.settings.max_prompts
    answer = httpx.post(served.url + COMPLETIONS, json={"prompt": ["hi"] * (most + 1), "max_tokens": 1})
    assert answer.status_code == 400
    assert str(most) in told(answer)["message"]
