"""What a conversation is made of: messages, tools, and the calls of tools that a model makes. Plain and frozen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lora_hub_sdk.errors import ConfigurationError, EmptyPromptError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: Final[tuple[Role, ...]] = ("system", "user", "assistant", "tool")
#: Beside these, ``tool_choice`` may be a tool's name.
CHOICES: Final = ("auto", "none", "any")
_MOST_CALLS: Final = 16
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made. ``arguments`` is the text of one JSON object, as it was generated."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True, slots=True)
class InvalidToolCall:
    """What began as a call and is none: cut off, no JSON, no object, or of a tool that there is not.

    ``arguments`` is the text as it was generated; ``name`` is None where there was none to read.
    """

    name: str | None
    arguments: str
    id: str
    error: str


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """Part of a call while it is generated; the first one of an ``index`` has its name and id, all bring arguments.

    The arguments' texts of one index, put together, are those of the finished call.
    """

    index: int
    name: str | None = None
    id: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``tool_calls`` are the assistant's; ``tool_call_id`` says which of them a tool's message answers."""

    role: Role
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


#: Which of a conversation's texts finds its adapters: the last turn of the user, all of the user's, or every message.
SearchBy = Literal["last_user", "user", "all"] | Callable[[Sequence[Message]], str]


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that a model may call. ``parameters`` is the text of a JSON schema of an object."""

    name: str
    description: str = ""
    parameters: str = '{"type": "object", "properties": {}}'


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages to be answered by the assistant, and the tools that it may call for it.

    Attributes:
        tool_choice: "auto" (text or calls), "none" (text), "any" (one call at least), or the name of the tool that has
            to be called.
        parallel_tool_calls: whether one answer may hold several calls; of a tool that was named, one is all there is.
        search_text: what finds the adapters, as ``search_text`` of this module makes it.
    """

    messages: tuple[Message, ...]
    search_text: str
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        search_by: SearchBy = "last_user",
    ) -> Conversation:
        """A conversation that makes sense.

        Raises:
            ConfigurationError: no message, an unknown role, tools of one name, of names that no model can be trusted to
                write, or of parameters that are no JSON object; a choice that is no tool's.
            EmptyPromptError: there is no text to find adapters by.
        """
        messages, tools = tuple(messages), tuple(tools)
        _check_messages(messages)
        _check_tools(tools, tool_choice)
        return cls(messages, search_text(messages, search_by), tools, tool_choice, parallel_tool_calls)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return ()
        return self.tools if self.tool_choice in CHOICES else tuple(t for t in self.tools if t.name == self.tool_choice)

    @property
    def most_calls(self) -> int:
        """How many calls the answer may hold. There is an end to them, as a small model may find none by itself."""
        return _MOST_CALLS if self.parallel_tool_calls and self.tool_choice in CHOICES else 1

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in ("auto", "none")


#: What is answered: a text, which a template may put into a conversation of one turn, or a conversation.
Prompt = str | Conversation
#: What comes before an answer is complete: text, or a part of a call.
Piece = str | ToolCallPiece


def search_text(messages: Sequence[Message], by: SearchBy = "last_user") -> str:
    """The text that finds a conversation's adapters.

    Where the user said nothing, that is every message's text.

    Raises:
        ConfigurationError: an unknown way.
        EmptyPromptError: there is none.
    """
    texts = {
        "all": [message.text for message in messages],
        "user": [message.text for message in messages if message.role == "user"],
    }
    if callable(by):
        found = by(messages)
    elif by == "last_user":
        found = next((text for text in reversed(texts["user"]) if text.strip()), "")
    elif by in texts:
        found = "\n".join(filter(str.strip, texts[by]))
    else:
        raise ConfigurationError(f"search_by={by!r}: expected last_user, user, all, or a function of the messages")
    found = found if found.strip() else "\n".join(filter(str.strip, texts["all"]))
    if not found.strip():
        raise EmptyPromptError(0)
    return found


def text_of(prompt: Prompt) -> str:
    """What a prompt's adapters are found by."""
    return prompt.search_text if isinstance(prompt, Conversation) else prompt


def _check_messages(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise ConfigurationError("a conversation without messages; give one message of the user at least")
    for place, message in enumerate(messages):
        if message.role not in ROLES:
            raise ConfigurationError(f"message {place}: role {message.role!r}; expected one of {', '.join(ROLES)}")
        if message.tool_calls and message.role != "assistant":
            raise ConfigurationError(
                f"message {place} of role {message.role!r} has tool calls; only assistants make them"
            )


def _check_tools(tools: tuple[Tool, ...], choice: str) -> None:
    names = [tool.name for tool in tools]
    for tool in tools:
        if not _TOOL_NAME.fullmatch(tool.name) or tool.name in (*CHOICES, "required"):
            raise ConfigurationError(
                f"tool {tool.name[:80]!r}: expected a name of 1 to 64 letters, digits, - and _, other than "
                f"{', '.join(CHOICES)} and required"
            )
        if names.count(tool.name) > 1:
            raise ConfigurationError(f"two tools are called {tool.name!r}; give each a name of its own")
        try:
            schema = json.loads(tool.parameters)
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"the parameters of tool {tool.name!r} are no JSON: {error}") from None
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise ConfigurationError(f"the parameters of tool {tool.name!r} are no JSON schema of an object")
    if choice not in (*CHOICES, *names):
        raise ConfigurationError(
            f"tool_choice={choice!r}: expected {', '.join(CHOICES)}, or one of the tools: {', '.join(names) or 'none'}"
        )
    if choice == "any" and not tools:
        raise ConfigurationError("tool_choice='any' without tools; give some, or leave the choice out")
