"""Guides allow what the grammar allows, end where it ends, and tell what cannot be compiled."""

from __future__ import annotations

import json
import random
import re
import threading
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from lora_hub_sdk.engine.constraint import Constraints
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Tool
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.types import Constraint

EOS = (2, 0)  # <|im_end|> and <|endoftext|>
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["x", "yy", "zé"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
}
JSON_SCHEMA = Constraint("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def smol() -> Any:
    return AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct", offline=True).folder)


@pytest.fixture(scope="module")
def constraints(smol: Any) -> Constraints:
    return Constraints(smol, EOS, threading.RLock())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "constraint",
    [JSON_SCHEMA, Constraint("regex", "[a-c]{2,9}(é|ü)?"), Constraint("lark", 'start: "a" "b"+ | /c{1,9}/')],
)
def test_any_walk_over_allowed_tokens_ends_in_a_text_of_the_grammar(
    smol: Any, constraints: Constraints, constraint: Constraint, seed: int
) -> None:
    pick, guide, taken = random.Random(seed), constraints.start(constraint)(), []
    while not guide.complete:
        allowed = [int(token) for token in guide.allowed(len(smol)).nonzero()[0]]
        assert allowed, "there is always a way on"
        assert all(guide.allows(token) for token in allowed)
        # The shortest half, for white space not to take all the time.
        token = pick.choice(sorted(allowed, key=lambda one: len(smol.decode([one])))[: len(allowed) // 2 + 1])
        if token in EOS:
            break
        guide.take(token)
        taken.append(token)
    text = smol.decode(taken)
    if constraint.kind == "json_schema":
        Draft202012Validator(SCHEMA).validate(json.loads(text))
    else:
        assert re.fullmatch({"regex": "[a-c]{2,9}(é|ü)?", "lark": "ab+|c{1,9}"}[constraint.kind], text)


def test_an_answer_may_end_only_where_it_is_whole(smol: Any, constraints: Constraints) -> None:
    guide = constraints.start(Constraint("regex", "ab?"))()
    (a, b) = smol("a")["input_ids"][0], smol("b")["input_ids"][0]
    assert not any(guide.allows(end) or guide.allowed(len(smol))[end] for end in EOS)
    guide.take(a)
    assert all(guide.allows(end) and guide.allowed(len(smol))[end] for end in EOS)
    assert not guide.complete
    guide.take(b)
    assert guide.complete


def test_a_token_that_the_grammar_refuses_is_not_allowed(smol: Any, constraints: Constraints) -> None:
    guide = constraints.start(JSON_SCHEMA)()
    hello = smol("hello")["input_ids"][0]
    assert not guide.allows(hello)
    assert not guide.allowed(len(smol))[hello]


def test_models_with_more_or_fewer_tokens_than_the_tokenizer_have_a_mask_of_their_size(
    constraints: Constraints,
) -> None:
    guide = constraints.start(Constraint("json"))()
    many, few = guide.allowed(50_000), guide.allowed(300)
    assert len(many) == 50_000
    assert not many[49_152:].any()
    assert (few == many[:300]).all()


def test_a_model_without_the_tokens_that_are_needed_is_told_of(constraints: Constraints) -> None:
    with pytest.raises(ConfigurationError, match="this model has none"):
        constraints.start(Constraint("json"))().allowed(10)


def test_rows_of_one_grammar_do_not_share_where_they_are(smol: Any, constraints: Constraints) -> None:
    new = constraints.start(Constraint("regex", "ab"))
    one, a = new(), smol("a")["input_ids"][0]
    one.take(a)
    assert new().allows(a)
    assert not one.allows(a)


def test_white_space_is_bounded_so_that_no_model_goes_on_with_it_for_ever(smol: Any, constraints: Constraints) -> None:
    for constraint in (Constraint("json"), JSON_SCHEMA):
        guide = constraints.start(constraint)()
        for token in smol("{\n  ")["input_ids"]:
            guide.take(token)
        assert not guide.allows(smol("\n")["input_ids"][0])


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        (Constraint("regex", "(a|b"), "unclosed group"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("lark", "start: nothing"), "nothing"),
        (Constraint("regex", "\ud800"), "surrogates"),
        (Constraint("json_schema", "{"), "no JSON"),
        (Constraint("json_schema", "[1]"), "expected an object"),
        (Constraint("json_schema", '{"type": "objekt"}'), "objekt"),
        (Constraint("json_schema", '{"$ref": "http://example.org/schema"}'), "example.org"),
        (Constraint("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum"),
        (Constraint("xml"), "unknown"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_compiled_is_told(constraints: Constraints, constraint: Constraint, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        constraints.start(constraint)


def test_schemas_that_would_take_for_ever_are_refused(constraints: Constraints) -> None:
    many = [{"anyOf": [{"type": "object", "properties": {f"x{j}": {"const": i}}} for i in range(8)]} for j in range(8)]
    deep: dict[str, object] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}}
    for schema in ({"allOf": many}, deep):
        with pytest.raises(ConfigurationError):
            constraints.start(Constraint("json_schema", json.dumps(schema)))


def test_a_grammar_that_becomes_too_complex_on_the_way_is_told(smol: Any, constraints: Constraints) -> None:
    schema = {"type": "object", "properties": {f"p{place}": {"type": "string"} for place in range(2000)}}
    guide = constraints.start(Constraint("json_schema", json.dumps(schema)))()
    with pytest.raises(ConfigurationError, match="any further"):
        guide.take(smol("{")["input_ids"][0])


def test_the_tool_whose_schema_is_at_fault_is_named(constraints: Constraints) -> None:
    tools = [Tool("good"), Tool("bad", parameters='{"properties": {"a": {"type": "objekt"}}}')]
    with pytest.raises(ConfigurationError, match=r"'bad'.*objekt"):
        constraints.start(Constraint("lark", "start: nothing"), tools)


def test_special_tokens_are_found_by_their_texts(constraints: Constraints) -> None:
    assert constraints.special(["<|im_start|>", "<tool_call>", "hello"]) == {"<|im_start|>": 1}


def test_a_tokenizer_that_cannot_be_used_is_told_of() -> None:
    class Slow:
        eos_token_id = 0

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ConfigurationError, match="tokenizer cannot be used"):
        Constraints(Slow(), [0], threading.RLock()).start(Constraint("json"))  # type: ignore[arg-type]
