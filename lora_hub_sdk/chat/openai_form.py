"""OpenAI's form of messages, tools, choices and formats: read into ours, and our calls and tools written in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lora_hub_sdk.chat.schema import held_schema
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import ROLES, Message, Role, Tool, ToolCall
from lora_hub_sdk.types import Constraint

_ROLES: Final[dict[str, Role]] = {**{role: role for role in ROLES}, "developer": "system"}

#: Schemas nested deeper are no honest ones, and parsers give up on them in ways of their own.
_DEPTH: Final = 100


def messages_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages as they are sent to ``/v1/chat/completions``.

    The texts of one message's parts are put together without anything between them. A tool's message that has no name
    gets that of the call which it answers.

    Raises:
        ConfigurationError: a role, a kind of content or a call that there is not; the place of it is named.
    """
    called: dict[str, str] = {}
    messages = []
    for place, row in enumerate(_list(rows, "messages")):
        message = _message(_object(row, f"messages[{place}]"), f"messages[{place}]", called)
        called.update((call.id, call.name) for call in message.tool_calls)
        messages.append(message)
    return tuple(messages)


def tools_of(rows: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """Tools of type "function"; None is none. ``strict`` changes nothing: calls are always held to their schema.

    Raises:
        ConfigurationError: another type of tool, or a part of one that is missing or of the wrong kind.
    """
    return tuple(_tool(row, f"tools[{place}]") for place, row in enumerate(_list(rows or (), "tools")))


def tool_choice_of(value: object) -> str:
    """A choice as ``Conversation`` has it: "auto", "none", "any" (also from "required" and True), or a tool's name.

    None is "auto" and False is "none". Whether there is a tool of that name is for ``Conversation.of`` to say.

    Raises:
        ConfigurationError: neither of those.
    """
    if value is None or isinstance(value, bool):
        return {None: "auto", True: "any", False: "none"}[value]
    if isinstance(value, str):
        return "any" if value == "required" else value
    choice = _object(value, "tool_choice")
    if choice.get("type") != "function":
        raise ConfigurationError(
            f"tool_choice has type {_shown(choice.get('type'))}; expected auto, none, required, or "
            '{"type": "function", "function": {"name": ...}}'
        )
    function = _object(choice.get("function"), "tool_choice.function")
    return _string(function.get("name"), "tool_choice.function.name")


def constraint_of(response_format: object) -> Constraint | None:
    """What ``response_format`` asks of an answer; None where it may be any text.

    ``strict`` changes nothing: an answer is always held to its schema, and its objects have no properties beyond
    those that the schema names, unless it says ``additionalProperties``.

    Raises:
        ConfigurationError: an unknown type, or a schema that is missing or no JSON object.
    """
    if response_format is None:
        return None
    asked = _object(response_format, "response_format")
    match asked.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint("json")
        case "json_schema":
            place = "response_format.json_schema"
            outer = _object(asked.get("json_schema"), place)
            schema = _object(outer.get("schema"), f"{place}.schema")
            _json(schema, f"{place}.schema")
            return Constraint("json_schema", held_schema(schema))
        case other:
            raise ConfigurationError(
                f"response_format has type {_shown(other)}; expected text, json_object or json_schema"
            )


def call_row(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form; its arguments stay a text."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tool_row(tool: Tool) -> dict[str, Any]:
    """A tool in OpenAI's form, as chat templates take it."""
    function = {"name": tool.name, "description": tool.description, "parameters": json.loads(tool.parameters)}
    return {"type": "function", "function": function}


def _message(row: Mapping[str, Any], place: str, called: Mapping[str, str]) -> Message:
    given = row.get("role")
    if given == "function":
        raise ConfigurationError(f"{place}: role 'function' is no longer known; send role 'tool' with a tool_call_id")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise ConfigurationError(f"{place}: role {_shown(given)}; expected one of {', '.join(_ROLES)}")
    content, calls = row.get("content"), row.get("tool_calls")
    if content is None and role in ("system", "user"):
        raise ConfigurationError(f"{place} of role {given!r} has no content; give it a text")
    name, answers = row.get("name"), None
    if name is not None:
        name = _string(name, f"{place}.name")
    if role == "tool":
        answers = _string(row.get("tool_call_id"), f"{place}.tool_call_id")
        name = name or called.get(answers)
    return Message(
        role=role,
        text="" if content is None else _text(content, f"{place}.content"),
        tool_calls=tuple(
            _call(call, f"{place}.tool_calls[{number}]")
            for number, call in enumerate(_list(calls or (), f"{place}.tool_calls"))
        ),
        tool_call_id=answers,
        name=name,
    )


def _text(content: object, place: str) -> str:
    if isinstance(content, str):
        return _string(content, place)
    texts = []
    for number, given in enumerate(_list(content, place)):
        part = _object(given, f"{place}[{number}]")
        if part.get("type") != "text":
            raise ConfigurationError(
                f"{place}[{number}] is of type {_shown(part.get('type'))}; only parts of type 'text' can be read"
            )
        texts.append(_string(part.get("text"), f"{place}[{number}].text"))
    return "".join(texts)


def _call(given: object, place: str) -> ToolCall:
    row = _object(given, place)
    if row.get("type", "function") != "function":
        raise ConfigurationError(f"{place} is of type {_shown(row.get('type'))}; only calls of functions can be read")
    function = _object(row.get("function"), f"{place}.function")
    return ToolCall(
        name=_string(function.get("name"), f"{place}.function.name"),
        arguments=_string(function.get("arguments"), f"{place}.function.arguments") or "{}",
        id=_string(row.get("id"), f"{place}.id"),
    )


def _tool(given: object, place: str) -> Tool:
    row = _object(given, place)
    if row.get("type") != "function":
        raise ConfigurationError(f"{place} is of type {_shown(row.get('type'))}; expected 'function'")
    function = _object(row.get("function"), f"{place}.function")
    tool = Tool(_string(function.get("name"), f"{place}.function.name"))
    description, parameters = function.get("description"), function.get("parameters")
    return Tool(
        name=tool.name,
        description="" if description is None else _string(description, f"{place}.function.description"),
        parameters=tool.parameters
        if parameters is None
        else _json(_object(parameters, f"{place}.function.parameters"), f"{place}.function.parameters"),
    )


def _list(value: object, place: str) -> Sequence[Any]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ConfigurationError(f"{place} is {_kind(value)}; expected a list")
    return value


def _object(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{place} is {_kind(value)}; expected an object")
    return value


def _string(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{place} is {_kind(value)}; expected a text")
    _check_unicode(value, place)
    return value


def _json(value: Mapping[str, Any], place: str) -> str:
    layer: list[Any] = [value]
    for _ in range(_DEPTH):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
    if layer:
        raise ConfigurationError(f"{place} is nested deeper than {_DEPTH} levels; make it flatter")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{place} cannot be written as JSON: {error}") from None
    _check_unicode(text, place)
    return text


def _check_unicode(text: str, place: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{place} is no Unicode text: character {error.start} is a lone surrogate") from None


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def _shown(value: object) -> str:
    return "(none)" if value is None else repr(value)[:80]
