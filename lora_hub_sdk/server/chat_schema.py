"""How the OpenAPI document describes messages, tools and formats; ``chat.openai_form`` is what reads them."""

from __future__ import annotations

from typing import Any, Final

_Schema = dict[str, Any]
_TEXT: Final[_Schema] = {"type": "string"}
_PART: Final[_Schema] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_CONTENT: Final[_Schema] = {"anyOf": [_TEXT, {"type": "array", "items": _PART}]}
_CALL: Final[_Schema] = {
    "type": "object",
    "required": ["id", "type", "function"],
    "properties": {
        "id": _TEXT,
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name", "arguments"],
            "properties": {"name": _TEXT, "arguments": {"type": "string", "description": "The text of a JSON object."}},
        },
    },
}


def _message(roles: list[str], required: list[str], **properties: _Schema) -> _Schema:
    return {
        "type": "object",
        "required": ["role", *required],
        "properties": {"role": {"enum": roles}, "content": _CONTENT, "name": _TEXT, **properties},
    }


MESSAGE: Final[_Schema] = {
    "anyOf": [
        _message(["user", "system", "developer"], ["content"]),
        _message(
            ["assistant"],
            [],
            content={"anyOf": [_CONTENT, {"type": "null"}]},
            tool_calls={"type": "array", "items": _CALL},
        ),
        _message(["tool"], ["content", "tool_call_id"], tool_call_id=_TEXT),
    ]
}
TOOL: Final[_Schema] = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"},
                "description": _TEXT,
                "parameters": {"type": "object", "description": "A JSON schema of an object."},
                "strict": {"type": ["boolean", "null"]},
            },
        },
    },
}
TOOL_CHOICE: Final[_Schema] = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": _TEXT}},
            },
        },
    ]
}
RESPONSE_FORMAT: Final[_Schema] = {
    "anyOf": [
        {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}},
        {
            "type": "object",
            "required": ["type", "json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object",
                    "required": ["name", "schema"],
                    "properties": {
                        "name": _TEXT,
                        "schema": {"type": "object"},
                        "strict": {"type": ["boolean", "null"]},
                    },
                },
            },
        },
    ]
}
