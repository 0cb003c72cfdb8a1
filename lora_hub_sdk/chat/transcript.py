"""A conversation as plain text, for models whose tokenizer brings no chat template."""

from __future__ import annotations

from typing import Final

from lora_hub_sdk.chat.hermes import Hermes
from lora_hub_sdk.messages import Conversation, Role

_SPEAKERS: Final[dict[Role, str]] = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "User"}


def transcript(conversation: Conversation) -> str:
    """What was said, up to where the answer begins.

    One message of the user alone stays as it is. Tools are told of, and calls and results written, in Hermes' form.
    """
    form = Hermes()
    told = form.instructions(conversation)
    first, *others = conversation.messages
    if first.role == "user" and not others and not told:
        return first.text
    turns: list[tuple[str, list[str]]] = []
    if told and first.role != "system":
        turns.append((_SPEAKERS["system"], [told]))
    for place, message in enumerate(conversation.messages):
        texts = [message.text] if message.role != "tool" else [form.result(message)]
        if message.tool_calls:
            texts.append(form.written(message.tool_calls))
        if place == 0 and message.role == "system":
            texts.append(told)
        turns.append((_SPEAKERS[message.role], texts))
    said = [" ".join(filter(None, [f"{speaker}:", "\n".join(filter(None, texts))])) for speaker, texts in turns]
    return "\n\n".join([*said, "Assistant:"])
