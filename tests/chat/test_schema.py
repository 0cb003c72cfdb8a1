"""Schemas as answers are held to them."""

from __future__ import annotations

import json
from typing import Any

from lora_hub_sdk.chat.schema import held_schema


def _held(schema: dict[str, Any], *, of_call: bool = False) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(held_schema(schema, of_call=of_call))
    assert held.pop("x-guidance")["lenient"] == of_call
    return held


def test_objects_have_no_properties_but_their_own_at_any_depth() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "string"}}}
    schema = {
        "properties": {"a": inner, "b": {"type": "array", "items": inner}, "c": {"anyOf": [inner, {"type": "null"}]}},
        "$defs": {"D": inner},
        "default": {"properties": {}},
    }

    closed = {**inner, "additionalProperties": False}
    assert _held(schema) == {
        "properties": {
            "a": closed,
            "b": {"type": "array", "items": closed},
            "c": {"anyOf": [closed, {"type": "null"}]},
        },
        "$defs": {"D": closed},
        "default": {"properties": {}},
        "additionalProperties": False,
    }


def test_objects_that_may_have_more_stay_open() -> None:
    schemas: list[dict[str, Any]] = [
        {"type": "object"},
        {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
    ]
    for schema in schemas:
        assert _held(schema) == schema


def test_integers_have_an_end() -> None:
    largest = 2**53 - 1
    within = {"minimum": -largest, "maximum": largest}
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"type": "integer"}, {"type": "integer", **within}),
        ({"type": ["integer", "null"]}, {"type": ["integer", "null"], **within}),
        ({"items": {"type": "integer", "minimum": 3}}, {"items": {"type": "integer", **within, "minimum": 3}}),
        ({"type": "integer", "exclusiveMaximum": 0}, {"type": "integer", "minimum": -largest, "exclusiveMaximum": 0}),
        *((same, same) for same in ({"type": "number"}, {"type": "integer", "enum": [1]})),
        ({"type": "integer", "minimum": 10**17}, {"type": "integer", "minimum": 10**17}),
    ]
    for schema, held in pairs:
        assert _held(schema) == held


def test_only_the_schema_of_a_call_loses_expressions_that_look_around() -> None:
    schema = {
        "type": "array",
        "items": {"type": "string", "pattern": r"^(?!a)\d$"},
        "prefixItems": [{"pattern": r"(a)\1"}, {"pattern": r"^(?:a|b)\\d+$"}],
    }

    assert _held(schema) == schema
    assert _held(schema, of_call=True) == {
        "type": "array",
        "items": {"type": "string"},
        "prefixItems": [{}, {"pattern": r"^(?:a|b)\\d+$"}],
    }
