"""``/v1/models``, and what the field ``model`` may be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_base
from tests.encoders import Hashing
from tests.server.conftest import SAMPLES, fill
from tests.server.serving import Served, serving


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def route_of(client: openai.OpenAI, model: str, **extra: Any) -> dict[str, Any]:
    found = client.completions.create(model=model, prompt="What is 2 + 2?", max_tokens=1, extra_body=extra)
    return (found.model_extra or {})["route"]  # type: ignore[no-any-return]


def names_of(route: dict[str, Any]) -> list[str]:
    return [one["name"] for one in route["adapters"]]


def test_every_model_that_is_listed_answers(client: openai.OpenAI) -> None:
    listed = [model.id for model in client.models.list()]
    assert listed == ["auto", "auto:selection", "auto:mixture", "auto:fusion", "base", "tiny-chat", *sorted(SAMPLES)]
    for name in listed:
        assert client.models.retrieve(name).id == name
        route_of(client, name)


def test_a_strategy_that_needs_a_gate_is_listed_while_its_own_is_in_use(
    client: openai.OpenAI, filled: LoraHub, chat_base: Path
) -> None:
    adapters = filled.list()
    (path, (_, d_in)), *_ = filled.engine(chat_base).base.shapes.items()
    experts = {one.name: one.digest for one in adapters}
    directions = {path: torch.ones(len(adapters), d_in)}
    filled.use_gate(ExpertGate("moe-soft", adapters[0].base_model, experts, directions))
    try:
        listed = [model.id for model in client.models.list()]
        assert listed[:5] == ["auto", "auto:selection", "auto:mixture", "auto:fusion", "auto:moe-soft"]
        assert "auto:ramole" not in listed
        assert sorted(names_of(route_of(client, "auto:moe-soft"))) == sorted(SAMPLES)
    finally:
        filled.use_gate(None, base_model=chat_base)


def test_the_field_model_says_who_answers(client: openai.OpenAI) -> None:
    assert route_of(client, "auto")["strategy"] == "mixture"
    assert len(names_of(route_of(client, "auto", k=2))) == 2
    assert route_of(client, "auto", strategy="fusion")["strategy"] == "fusion"
    assert len(names_of(route_of(client, "auto:selection"))) == 1
    assert names_of(route_of(client, "poems")) == ["poems"]
    for name in ("base", "tiny-chat"):
        assert route_of(client, name) == {
            "strategy": "base",
            "adapters": [],
            "base_model": "tiny-chat",
            "truncated_tokens": 0,
        }


def test_adapters_can_be_named_left_out_and_bounded(client: openai.OpenAI) -> None:
    assert names_of(route_of(client, "auto", adapters=["poems", "maths"])) == ["poems", "maths"]
    assert "maths" not in names_of(route_of(client, "auto", exclude=["maths"]))
    assert names_of(route_of(client, "auto", min_score=1.0)) == []


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        ("auto:selection", {"strategy": "fusion"}),
        ("base", {"adapters": ["maths"]}),
        ("base", {"strategy": "mixture"}),
        ("maths", {"adapters": ["poems"]}),
        ("auto:selection", {"adapters": ["maths", "poems"]}),
    ],
)
def test_contradictions_are_refused(client: openai.OpenAI, model: str, extra: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError):
        route_of(client, model, **extra)


def test_an_unknown_model_is_not_found_and_alike_ones_are_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="maths") as caught:
        route_of(client, "math")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/none\x00")
    with pytest.raises(openai.NotFoundError):
        route_of(client, "auto", adapters=["nobody"])


def test_no_adapter_left_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="base"):
        route_of(client, "auto", exclude=[*SAMPLES])


def test_without_a_base_model_each_adapter_brings_its_own(
    open_hub: Callable[..., LoraHub], chat_base: Path, tmp_path: Path
) -> None:
    other = tiny_base(tmp_path / "other", seed=5, context=1024)
    hub = open_hub(offline=True, encoder=Hashing("one"))
    fill(hub, chat_base, tmp_path)
    fill(hub, other, tmp_path / "second", namespace="second")
    with serving(hub, base_model=None) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        assert route_of(client, "maths")["base_model"] == "tiny-chat"
        assert route_of(client, "auto")["base_model"] == "tiny-chat"
        assert route_of(client, "tiny-chat")["adapters"] == []
        for name in ("base", "other"):  # neither tells one base, nor is another namespace's anybody's business here
            answer = httpx.post(f"{served.url}/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1})
            assert answer.status_code in (400, 404), answer.text
        assert [model.id for model in client.models.list()][-4:] == ["tiny-chat", *sorted(SAMPLES)]
