"""Conversations as plain text."""

from __future__ import annotations

from lora_hub_sdk.chat.transcript import transcript
from lora_hub_sdk.messages import Conversation, Message, ToolCall
from tests.chat.tools import asked


def test_one_message_of_the_user_stays_as_it_is() -> None:
    assert transcript(Conversation.of([Message("user", " Hi\n")])) == " Hi\n"


def test_turns_are_told_apart_and_the_answer_comes_next() -> None:
    said = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Ho"), Message("user", "Well?")]

    assert (
        transcript(Conversation.of(said))
        == "System: Be brief.\n\nUser: Hi\n\nAssistant: Ho\n\nUser: Well?\n\nAssistant:"
    )


def test_tools_calls_and_results_are_told_in_hermes_form() -> None:
    question = asked()
    call = ToolCall("search", '{"query": "new"}', "1")
    messages = [
        *question.messages,
        Message("assistant", "Wait.", tool_calls=(call,)),
        Message("tool", "A page.", tool_call_id="1"),
    ]

    text = transcript(Conversation.of(messages, tools=question.tools))

    assert text.startswith("System: You can call these tools")
    assert text.endswith(
        "User: What is new?\n\n"
        'Assistant: Wait.\n<tool_call>\n{"name": "search", "arguments": {"query": "new"}}\n</tool_call>\n\n'
        "User: <tool_response>\nA page.\n</tool_response>\n\nAssistant:"
    )
    assert transcript(question).endswith("plain text. You may make several calls.\n\nUser: What is new?\n\nAssistant:")
