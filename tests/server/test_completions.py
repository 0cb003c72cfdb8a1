"""``/v1/completions`` as OpenAI's own client asks for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.types import Routing, Sampling
from tests.server.serving import Served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_a_prompt_is_answered_as_the_hub_answers_it(client: openai.OpenAI, filled: LoraHub, chat_base: Path) -> None:
    found = client.completions.create(model="auto", prompt="What is 12 + 30?", max_tokens=12)
    (expected,) = filled.generate(["What is 12 + 30?"], base_model=chat_base, sampling=Sampling(12))
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert found.usage is not None
    assert found.usage.to_dict() == expected.usage.as_dict()
    assert found.id.startswith("cmpl-")
    assert found._request_id == found.id
    route = found.to_dict()["route"]
    assert isinstance(route, dict)
    assert [one["name"] for one in route["adapters"]] == [
        member.adapter.name for member in expected.trace.route.members
    ]
    assert route["base_model"] == "tiny-chat"
    assert all(one["repo_id"] is None for one in route["adapters"]), "folders of the server are nobody's business"


def test_several_prompts_have_a_choice_and_a_route_each(
    client: openai.OpenAI, filled: LoraHub, chat_base: Path
) -> None:
    prompts = ["Add 4 and 9.", "Write a poem about the sea"]
    found = client.completions.create(model="auto:selection", prompt=prompts, max_tokens=8)
    expected = filled.generate(prompts, base_model=chat_base, sampling=Sampling(8), routing=Routing("selection"))
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert [choice.to_dict()["route"]["adapters"][0]["name"] for choice in found.choices] == ["maths", "poems"]  # type: ignore[index]
    assert found.usage is not None
    assert found.usage.total_tokens == sum(one.usage.total_tokens for one in expected)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    options: Any = {"model": "maths", "prompt": "What is 7 + 7?", "max_tokens": 12}
    whole = client.completions.create(**options)
    parts = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].usage == whole.usage
    assert parts[-2].choices[0].to_dict()["route"] == whole.to_dict()["route"]
    assert len({part.id for part in parts}) == 1


def test_several_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    prompts = ["Add 4 and 9.", "Write a poem about the sea", "Add 4 and 9."]
    options: Any = {"model": "auto", "prompt": prompts, "max_tokens": 8}
    whole = client.completions.create(**options)
    texts = ["", "", ""]
    for part in client.completions.create(**options, stream=True):
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


async def _ask(served: Served, prompts: list[str]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        calls = (client.completions.create(model="auto", prompt=prompt, max_tokens=6) for prompt in prompts)
        return [found.choices[0].text for found in await asyncio.gather(*calls)]


def test_the_asynchronous_client_gets_the_same_answers(served: Served, client: openai.OpenAI) -> None:
    prompts = [f"What is {number} + 1?" for number in range(8)]
    alone = [client.completions.create(model="auto", prompt=one, max_tokens=6).choices[0].text for one in prompts]
    assert asyncio.run(_ask(served, prompts)) == alone


@pytest.mark.parametrize("asked", [{"k": 33}, {"adapters": [f"adapter {number}" for number in range(33)]}])
def test_a_route_of_too_many_adapters_is_refused_before_they_are_looked_for(
    client: openai.OpenAI, asked: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match="33 are more than 32, the most adapters of a route here") as error:
        client.completions.create(model="auto", prompt="What is 2 + 2?", extra_body=asked)
    assert error.value.param == next(iter(asked))
