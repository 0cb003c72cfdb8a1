"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from lora_hub_sdk.chat.openai_form import constraint_of, messages_of, tool_choice_of, tools_of
from lora_hub_sdk.messages import Conversation
from lora_hub_sdk.server.chat_schema import MESSAGE, RESPONSE_FORMAT, TOOL, TOOL_CHOICE
from lora_hub_sdk.server.fields import Answered, Count, Zero
from lora_hub_sdk.types import Constraint

_Object = dict[str, Any]


class ChatBody(Answered):
    """A conversation."""

    messages: Annotated[list[Annotated[_Object, WithJsonSchema(MESSAGE)]], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Annotated[_Object, WithJsonSchema(TOOL)]], Field(max_length=128)] | None = None
    tool_choice: Annotated[str | _Object, WithJsonSchema(TOOL_CHOICE)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[_Object, WithJsonSchema(RESPONSE_FORMAT)] | None = None
    search_by: Annotated[
        Literal["last_user", "user", "all"] | None, Field(description="Which texts find the adapters.")
    ] = None
    logprobs: Literal[False] | None = None
    top_logprobs: Zero | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def longest(self) -> int | None:
        """The most tokens of an answer, where that was said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def conversation(self) -> Conversation:
        """What is answered.

        Raises:
            ConfigurationError, EmptyPromptError: it makes no sense; the place is named.
        """
        tools = tools_of(self.tools)
        return Conversation.of(
            messages_of(self.messages),
            tools=tools,
            tool_choice=tool_choice_of(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            search_by=self.search_by or "last_user",
        )

    def constraint(self) -> Constraint | None:
        """What an answer's text has to be.

        Raises:
            ConfigurationError: a format that there is not.
        """
        return constraint_of(self.response_format)
