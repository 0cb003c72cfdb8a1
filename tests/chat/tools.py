"""Tools that the tests of grammars and readers share, and what a call of each looks like."""

from __future__ import annotations

import json

from lora_hub_sdk.messages import Conversation, Message, Tool

#: Nested objects by reference, a list, a choice, and what may be left out.
SEARCH = Tool(
    "search",
    "Finds pages.",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "query": {"type": "string", "maxLength": 8},
                "where": {"$ref": "#/$defs/Where"},
                "pages": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 2},
            },
            "required": ["query"],
            "$defs": {
                "Where": {
                    "type": "object",
                    "properties": {"site": {"enum": ["a.org", "b/c"]}, "deep": {"type": "boolean"}},
                    "required": ["site"],
                }
            },
        }
    ),
)
#: Its name begins like the other's.
SEARCH_ALL = Tool("search_all")
TOOLS = (SEARCH, SEARCH_ALL)
ARGUMENTS = '{"query": "a\\"}b", "where": {"site": "b/c", "deep": true}, "pages": [1, 9]}'


def asked(choice: str = "auto", *, parallel: bool = True, tools: tuple[Tool, ...] = TOOLS) -> Conversation:
    """A question with tools."""
    return Conversation.of(
        [Message("user", "What is new?")], tools=tools, tool_choice=choice, parallel_tool_calls=parallel
    )
