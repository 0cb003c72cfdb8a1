"""Reading OpenAI's form of messages, tools, choices and formats."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lora_hub_sdk.chat.openai_form import call_row, constraint_of, messages_of, tool_choice_of, tool_row, tools_of
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Conversation, Message, Tool, ToolCall
from lora_hub_sdk.types import Constraint

_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
_USER = {"role": "user", "content": "Hi"}


def test_a_conversation_with_calls_is_read() -> None:
    rows: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "1."}], "name": "Ida"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "2.", "tool_calls": None, "refusal": None},
    ]

    messages = messages_of(rows)

    call = ToolCall("add", '{"a": 1}', "c1")
    assert messages == (
        Message("system", "Be brief."),
        Message("user", "Add 1.", name="Ida"),
        Message("assistant", tool_calls=(call,)),
        Message("tool", "2", tool_call_id="c1", name="add"),
        Message("assistant", "2."),
    )
    assert call_row(call) == _CALL
    assert Conversation.of(messages).search_text == "Add 1."


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("Hi", "messages is of type str; expected a list"),
        (["Hi"], r"messages\[0\] is of type str; expected an object"),
        (
            [{"content": "Hi"}],
            r"messages\[0\]: role \(none\); expected one of system, user, assistant, tool, developer",
        ),
        ([{"role": ["user"], "content": "Hi"}], r"role \['user'\]"),
        ([_USER, {"role": "function", "content": "1"}], r"messages\[1\]: role 'function' is no longer known"),
        ([{"role": "user"}], r"messages\[0\] of role 'user' has no content"),
        ([{"role": "user", "content": 1}], r"messages\[0\].content is of type int; expected a list"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url"}]}],
            r"messages\[0\].content\[1\] is of type 'image_url'; only parts of type 'text'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is missing"),
        ([{"role": "tool", "content": "1"}], r"messages\[0\].tool_call_id is missing"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], r"tool_calls\[0\] is of type 'custom'"),
        ([{"role": "assistant", "tool_calls": [{**_CALL, "id": None}]}], r"tool_calls\[0\].id is missing"),
        ([{"role": "assistant", "tool_calls": 1}], r"tool_calls is of type int"),
        (
            [{"role": "assistant", "tool_calls": [{**_CALL, "function": {"name": "a", "arguments": {}}}]}],
            r"function.arguments is of type dict; expected a text",
        ),
        ([{"role": "user", "content": "a\ud800"}], "character 1 is a lone surrogate"),
        ([{"role": "user", "content": "a", "name": {}}], r"messages\[0\].name is of type dict"),
    ],
)
def test_messages_that_cannot_be_read_are_named_by_their_place(rows: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        messages_of(rows)


def test_tools_are_read_and_written() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "title": "ä"}}}
    row = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": schema}}

    [add, bare] = tools_of([{**row, "strict": True}, {"type": "function", "function": {"name": "now"}}])

    assert (add.name, add.description, json.loads(add.parameters)) == ("add", "Adds.", schema)
    assert bare == Tool("now")
    assert tool_row(add) == row
    assert tools_of(None) == ()


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"type": "web_search"}, r"tools\[0\] is of type 'web_search'"),
        ({"type": "function"}, r"tools\[0\].function is missing"),
        ({"type": "function", "function": {}}, r"function.name is missing"),
        ({"type": "function", "function": {"name": "a", "description": 1}}, r"description is of type int"),
        ({"type": "function", "function": {"name": "a", "parameters": []}}, r"parameters is of type list"),
        (
            {"type": "function", "function": {"name": "a", "parameters": {"a": float("nan")}}},
            "cannot be written as JSON",
        ),
        ({"type": "function", "function": {"name": "a", "parameters": {"a": "\udfff"}}}, "lone surrogate"),
        ({"type": "function", "function": {"name": "a", "parameters": _deep(60)}}, "nested deeper than 100 levels"),
    ],
)
def test_tools_that_cannot_be_used_are_refused(row: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tools_of([row])


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        (False, "none"),
        ("required", "any"),
        ("any", "any"),
        (True, "any"),
        ("add", "add"),
        ({"type": "function", "function": {"name": "add"}}, "add"),
    ],
)
def test_choices_are_read(value: object, choice: str) -> None:
    assert tool_choice_of(value) == choice


@pytest.mark.parametrize("value", [1, [], {}, {"type": "allowed_tools"}, {"type": "function", "function": {"name": 1}}])
def test_choices_that_there_are_not_are_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="tool_choice"):
        tool_choice_of(value)


def test_formats_are_read() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}

    assert constraint_of(None) is None
    assert constraint_of({"type": "text"}) is None
    assert constraint_of({"type": "json_object"}) == Constraint("json")
    held = constraint_of({"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    assert held is not None
    assert held.kind == "json_schema"
    assert json.loads(held.text).items() >= {**schema, "additionalProperties": False}.items()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", "response_format is of type str"),
        ({}, r"response_format has type \(none\); expected text, json_object or json_schema"),
        ({"type": "grammar"}, "has type 'grammar'"),
        ({"type": "json_schema"}, "response_format.json_schema is missing"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema is missing"),
        ({"type": "json_schema", "json_schema": {"schema": _deep(60)}}, "nested deeper than 100 levels"),
    ],
)
def test_formats_that_there_are_not_are_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        constraint_of(value)
