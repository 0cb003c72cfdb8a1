"""What a model is told of its tools where its chat template cannot say it."""

from __future__ import annotations

import json
from typing import Final

from lora_hub_sdk.chat.openai_form import tool_row
from lora_hub_sdk.messages import Conversation

_NEVER_MIND: Final = "Call a tool only where it helps; otherwise answer in plain text."


def instructions(conversation: Conversation, example: str) -> str:
    """The callable tools, how they are called, and what the choice asks for; empty where none can be called.

    Args:
        example: one call in the model's form.
    """
    tools = conversation.callable_tools
    if not tools:
        return ""
    rows = [json.dumps(tool_row(tool)["function"], ensure_ascii=False) for tool in tools]
    if not conversation.must_call:
        wanted = _NEVER_MIND
    elif conversation.tool_choice == "any":
        wanted = "Your answer must be a call."
    else:
        wanted = f"Your answer must be a call of {tools[0].name}."
    several = "You may make several calls." if conversation.most_calls > 1 else "Make no more than one call."
    return "\n".join(
        [
            "You can call these tools, each a JSON object with a JSON schema of its parameters:",
            *rows,
            "",
            "Call a tool by writing:",
            example,
            "",
            f"{wanted} {several}",
        ]
    )


def call_json(name: str, arguments: str, word: str = "arguments") -> str:
    """A call as a JSON object; arguments that are no JSON become a text in it."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = arguments
    return json.dumps({"name": name, word: value}, ensure_ascii=False)
