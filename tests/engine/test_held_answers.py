"""Answers that are held to a grammar, in batches with others: each is the one that its request would get alone."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from lora_hub_sdk.engine.base_model import BaseModel, load_base_model
from lora_hub_sdk.engine.batch_lora import BatchLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Conversation, InvalidToolCall, Message, Tool, ToolCall, ToolCallPiece
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import byte_tokenizer, tiny_base, tiny_family
from lora_hub_sdk.types import Adapter, Completion, Constraint, Sampling
from tests.engine.crowd import Tap, adapters_in, answers_alone, assert_nothing_is_left, random_route, same
from tests.support import route_of

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["one", "two", "three"]},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
HELD = (
    None,
    Constraint("json"),
    Constraint("json_schema", json.dumps(SCHEMA)),
    Constraint("regex", "[a-f]{3,12}[.!]"),
    None,
)
TOOL = Tool(
    "look_up",
    "Looks something up",
    json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With room for what is told of tools, a token a byte."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny", context=1024)


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(resolve_model(base))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return adapters_in(tmp_path_factory.mktemp("adapters"), base, 6)


@pytest.fixture
def engine(loaded: BaseModel) -> Iterator[Engine]:
    made = Engine(loaded)
    yield made
    made.close()


def asking(text: str = "look it up", **options: Any) -> Conversation:
    return Conversation.of([Message("user", text)], **{"tools": [TOOL], **options})


@pytest.fixture(scope="module")
def asked(adapters: list[Adapter]) -> list[Request]:
    """Held and free, greedy and sampled, with tools and without, side by side."""
    pick = random.Random(5)
    found = []
    for place in range(20):
        sampling = Sampling(
            pick.randint(4, 30),
            temperature=pick.choice((0.0, 0.0, 1.1)),
            top_k=pick.choice((0, 9)),
            top_p=pick.choice((1.0, 0.8)),
            seed=place,
            constraint=HELD[place % 5],
        )
        text = f"number {place} " + "x" * place
        prompt = asking(text, tool_choice=pick.choice(("auto", "any", "look_up"))) if place % 4 == 3 else text
        found.append(Request(prompt, random_route(pick, adapters), sampling))
    return found


@pytest.fixture(scope="module")
def alone(loaded: BaseModel, asked: list[Request]) -> list[Completion]:
    return answers_alone(loaded, asked)


def without_ids(found: Completion) -> Completion:
    """A call's id is drawn anew each time."""
    return replace(
        found,
        tool_calls=tuple(replace(call, id="") for call in found.tool_calls),
        invalid_tool_calls=tuple(replace(call, id="") for call in found.invalid_tool_calls),
    )


def all_same(found: list[Completion], alone: list[Completion]) -> bool:
    return all(same(without_ids(one), without_ids(other)) for one, other in zip(found, alone, strict=True))


def test_a_batch_of_held_and_free_rows_gives_each_what_it_gets_alone(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    assert all_same(engine.generate(asked), alone)
    order = random.Random(1).sample(range(20), 20)
    turned = engine.generate([asked[place] for place in order])
    assert all_same(turned, [alone[place] for place in order])
    assert max(one.trace.batch_size for one in turned) > 8


def test_rows_that_join_while_others_decode_give_what_they_give_alone(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    async def main() -> list[Completion]:
        async def later(place: int) -> Completion:
            await asyncio.sleep(place * 0.004)
            return (await engine.agenerate([asked[place]]))[0]

        return list(await asyncio.gather(*map(later, range(20))))

    assert all_same(asyncio.run(main()), alone)


def test_held_rows_go_on_where_they_were_after_passes_that_failed(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    passes = [0]

    def fails(batch: BatchLora) -> None:
        passes[0] += 1
        if len(batch.rows) > 1 and passes[0] % 7 == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    tap = Tap(engine, fails)
    assert all_same(engine.generate(asked), alone)
    assert passes[0] > 14
    assert max(tap.sizes) > 1
    assert_nothing_is_left(engine)


def test_free_rows_are_the_same_as_without_held_neighbours(
    engine: Engine, asked: list[Request], alone: list[Completion]
) -> None:
    free = [place for place, one in enumerate(asked) if isinstance(one.prompt, str) and not one.sampling.constraint]
    assert len(free) > 4
    together = engine.generate(asked)
    apart = engine.generate([asked[place] for place in free])
    assert all_same([together[place] for place in free], apart)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_are_what_their_constraint_says(engine: Engine, temperature: float) -> None:
    held = [Sampling(500, temperature, seed=seed, constraint=HELD[2]) for seed in range(8)]
    answers = engine.generate([Request(f"{seed}", route_of("base"), one) for seed, one in enumerate(held)])
    for answer in answers:
        assert answer.finish_reason == "stop"
        Draft202012Validator(SCHEMA).validate(json.loads(answer.text))
    assert len({answer.text for answer in answers}) > 1


def test_a_complete_answer_ends_without_a_token_more(engine: Engine) -> None:
    sampling = Sampling(50, constraint=Constraint("regex", "abc"))
    answer = engine.generate([Request("x", route_of("base"), sampling)])[0]
    assert (answer.text, answer.finish_reason) == ("abc", "stop")
    assert answer.usage.completion_tokens == 3


def test_stop_strings_and_lengths_end_held_answers_too(engine: Engine) -> None:
    constraint = Constraint("regex", "abcdef")
    requests = [
        Request("x", route_of("base"), Sampling(50, stop=("d",), constraint=constraint)),
        Request("x", route_of("base"), Sampling(4, constraint=constraint)),
        Request("x", route_of("base"), Sampling(6, constraint=constraint)),
    ]
    found = [(answer.text, answer.finish_reason) for answer in engine.generate(requests)]
    assert found == [("abc", "stop"), ("abcd", "length"), ("abcdef", "stop")]


def test_a_constraint_that_cannot_be_compiled_is_refused_before_anything_is_queued(engine: Engine) -> None:
    bad = Request("x", route_of("base"), Sampling(4, constraint=Constraint("regex", "(")))
    good = Request("x", route_of("base"), Sampling(4))
    with pytest.raises(ConfigurationError, match="expression"):
        engine.generate([good, bad])
    with pytest.raises(ConfigurationError, match="expression"):
        asyncio.run(engine.agenerate([good, bad]))
    assert engine.batches == 0
    tools = Conversation.of([Message("user", "x")], tools=[replace(TOOL, parameters='{"items": {"type": "objekt"}}')])
    with pytest.raises(ConfigurationError, match="objekt"):
        engine.submit(Request(tools, route_of("base"), Sampling(4)))


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_of_calls_is_the_completion_in_pieces(engine: Engine, seed: int) -> None:
    prompt = asking(f"seed {seed}", tool_choice="any")
    *pieces, answer = engine.stream(Request(prompt, route_of("base"), Sampling(250, 0.7, seed=seed)))
    assert isinstance(answer, Completion)
    calls: list[ToolCall | InvalidToolCall] = [*answer.tool_calls, *answer.invalid_tool_calls]
    assert answer.tool_calls
    for made in answer.tool_calls:
        assert made.name == "look_up"
        assert json.loads(made.arguments)["n"] in (1, 2, 3)
    heads = [piece for piece in pieces if isinstance(piece, ToolCallPiece) and piece.id is not None]
    assert {(head.id, head.name) for head in heads} == {(call.id, call.name) for call in calls}
    for head in heads:
        (call,) = (call for call in calls if call.id == head.id)
        parts = [piece for piece in pieces if isinstance(piece, ToolCallPiece) and piece.index == head.index]
        assert "".join(part.arguments for part in parts) == call.arguments
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == answer.text


def test_one_call_at_most_ends_the_answer(engine: Engine) -> None:
    prompt = asking(tool_choice="look_up", parallel_tool_calls=False)
    for seed in range(3):
        answer = engine.generate([Request(prompt, route_of("base"), Sampling(150, 1.2, seed=seed))])[0]
        assert answer.finish_reason == "stop"
        assert len(answer.tool_calls) == 1
        assert answer.text == ""


def test_without_a_choice_of_tools_markers_are_text(engine: Engine) -> None:
    constraint = Constraint("lark", 'start: "<tool_call>{}</tool_call>"')
    asked = Request(asking(tool_choice="none"), route_of("base"), Sampling(60, constraint=constraint))
    answer = engine.generate([asked])[0]
    assert answer.text == "<tool_call>{}</tool_call>"
    assert not answer.tool_calls
    assert not answer.invalid_tool_calls


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("stream", [True, False])
def test_markers_that_are_tokens_survive_decoding(tmp_path: Path, special: bool, stream: bool) -> None:
    tokenizer = byte_tokenizer(template="{{ messages[0].content }}{% if tools %}[TOOL_CALLS]{% endif %}")
    tokenizer.add_tokens(["[TOOL_CALLS]", "[OTHER]"], special_tokens=special)
    folder = tiny_family(tmp_path / "base", "llama", tokenizer=tokenizer)
    engine = Engine(load_base_model(resolve_model(folder)))
    request = Request(asking(tool_choice="any", parallel_tool_calls=False), route_of("base"), Sampling(120))
    answer = list(engine.stream(request))[-1] if stream else engine.generate([request])[0]
    engine.close()
    assert isinstance(answer, Completion)
    (call,) = answer.tool_calls
    assert call.name == "look_up"
    assert answer.text == ""


def test_on_text_is_given_texts_alone(engine: Engine) -> None:
    shown: list[str] = []
    request = Request(asking(tool_choice="any", parallel_tool_calls=False), route_of("base"), Sampling(120))
    free = Request("hello", route_of("base"), Sampling(9))
    answers = engine.generate([request, free], on_text=lambda _, text: shown.append(text))
    assert "".join(shown) == answers[1].text
    assert answers[0].tool_calls
