"""``LoraRetrieverLLM``: a LlamaIndex model that answers each prompt with its own retrieved and composed adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Final

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    ToolCallBlock,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt

from llama_index_lora_hub.answers import Reading, chatted, completed
from llama_index_lora_hub.messages import arguments_of, rows_of
from llama_index_lora_hub.structured import SchemaPredictor
from lora_hub_sdk.chat.openai_form import constraint_of, messages_of, tool_choice_of, tools_of
from lora_hub_sdk.errors import ConfigurationError, UnusableAnswerError
from lora_hub_sdk.faces.answer_fields import AnswerFields
from lora_hub_sdk.messages import Conversation, SearchBy

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

#: What may be given to a chat beside the options of ``AnswerFields``.
_CHAT: Final = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "search_by")


class LoraRetrieverLLM(AnswerFields, SchemaPredictor):
    """Finds for each prompt or conversation the adapters that fit, composes them, and answers.

    All of LlamaIndex's ways to ask work: complete and chat, streaming, asynchronous, with tools, and structured. Calls
    at one time, from threads and tasks, share the engine's batches; the asynchronous ones never block the event loop,
    and cancelling their task gives their prompt up.

    Options of routing and sampling may be given anew with each call (``llm.complete(prompt, strategy="fusion", k=2)``);
    a chat takes also ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``response_format`` in OpenAI's form, and
    ``search_by``. Every response tells in ``raw`` its ``"route"`` (``{"strategy": ..., "adapters": [{"name", "repo_id",
    "revision", "score", "weight"}, ...]}``), ``"model"``, ``"usage"``, ``"finish_reason"`` and ``"timing"``; streams do
    so with their last response.

    A prompt becomes one turn of the model's chat template; with ``formatted=True`` it goes in as it is. A
    ``completion_to_prompt`` takes the template's place, and the prompt before it still finds the adapters.

    Raises:
        UnknownStrategyError, ConfigurationError: at construction, for values that no call could use.
    """

    #: Which of a conversation's texts finds its adapters: the last turn of the user, all of the user's, all messages,
    #: or a function of the messages.
    search_by: SearchBy = "last_user"

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.use_fields()
        if self.messages_to_prompt is not generic_messages_to_prompt:
            raise ConfigurationError(
                "messages_to_prompt is not used: conversations are put into the model's own chat template; give "
                "template= for prompts, or leave it out"
            )

    @classmethod
    def class_name(cls) -> str:
        return "LoraRetrieverLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """The context of the base model, without loading it; where it may be one of several, the shortest of theirs."""
        return LLMMetadata(
            context_window=min(map(self.hub.context, self.possible_bases()), default=DEFAULT_CONTEXT_WINDOW),
            num_output=self.max_new_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self._model_name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What instrumentation is told with each call: nothing that has to be looked up."""
        return {
            "class_name": self.class_name(),
            "model_name": self._model_name,
            "strategy": self.strategy,
            "k": self.k,
            "namespace": self.namespace,
            "num_output": self.max_new_tokens,
            "temperature": self.temperature,
        }

    # -- prompts ------------------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As LlamaIndex's; ``kwargs`` are options for this call."""
        (completion,) = self.hub.generate([prompt], **self._asked(formatted, kwargs))
        return completed(completion)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As ``complete``, on the event loop."""
        (completion,) = await self.hub.agenerate([prompt], **self._asked(formatted, kwargs))
        return completed(completion)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """As ``complete``, while it is written. Closing the generator gives the prompt up."""
        pieces = self.hub.stream(prompt, **self._asked(formatted, kwargs))

        def responses() -> CompletionResponseGen:
            reading = Reading()
            with closing(pieces):
                for piece in pieces:
                    yield reading.completed(piece)

        return responses()

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """As ``stream_complete``, on the event loop."""
        pieces = self.hub.astream(prompt, **self._asked(formatted, kwargs))

        async def responses() -> CompletionResponseAsyncGen:
            reading = Reading()
            async with aclosing(pieces):
                async for piece in pieces:
                    yield reading.completed(piece)

        return responses()

    # -- conversations ------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As LlamaIndex's; ``kwargs`` are options for this call, tools and a format among them."""
        conversation, asked = self._conversation(messages, kwargs)
        (completion,) = self.hub.generate([conversation], **asked)
        return chatted(completion)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As ``chat``, on the event loop."""
        conversation, asked = self._conversation(messages, kwargs)
        (completion,) = await self.hub.agenerate([conversation], **asked)
        return chatted(completion)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """As ``chat``, while it is written. Closing the generator gives the conversation up."""
        conversation, asked = self._conversation(messages, kwargs)
        pieces = self.hub.stream(conversation, **asked)

        def responses() -> ChatResponseGen:
            reading = Reading()
            with closing(pieces):
                for piece in pieces:
                    yield reading.chatted(piece)

        return responses()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As ``stream_chat``, on the event loop."""
        conversation, asked = self._conversation(messages, kwargs)
        pieces = self.hub.astream(conversation, **asked)

        async def responses() -> ChatResponseAsyncGen:
            reading = Reading()
            async with aclosing(pieces):
                async for piece in pieces:
                    yield reading.chatted(piece)

        return responses()

    # -- tools --------------------------------------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or ())
        if user_msg is not None:
            messages.append(
                ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
            )
        return {
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": ("required" if tool_required else "auto") if tool_choice is None else tool_choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of a response; in a stream, also those that are still being written.

        Raises:
            UnusableAnswerError: there is none.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            invalid = response.message.additional_kwargs.get("invalid_tool_calls")
            found = f"only calls that cannot be made: {invalid}" if invalid else repr(response.message.content)[:200]
            raise UnusableAnswerError(
                f"a call of a tool was expected, the answer is {found}; give tool_required=True, or a larger "
                "max_new_tokens where it was cut off"
            )
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=arguments_of(call))
            for call in calls
        ]

    # -- private ------------------------------------------------------------------------------------------------------

    @property
    def _model_name(self) -> str:
        return "auto" if self.base_model is None else str(self.base_model)

    def _asked(self, formatted: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of ``hub.generate`` for a prompt."""
        into: Callable[[str], str] | None = self.completion_to_prompt
        own = {"template": None} if formatted else {} if into is default_completion_to_prompt else {"template": into}
        return self.asked({**own, **kwargs})

    def _conversation(
        self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> tuple[Conversation, dict[str, Any]]:
        """What is answered, and the keywords of ``hub.generate`` for it."""
        given = {name: value for name, value in kwargs.items() if name not in _CHAT}
        parallel = kwargs.get("parallel_tool_calls")
        conversation = Conversation.of(
            messages_of(rows_of(messages)),
            tools=tools_of(kwargs.get("tools")),
            tool_choice=tool_choice_of(kwargs.get("tool_choice")),
            parallel_tool_calls=parallel is None or bool(parallel),
            search_by=kwargs.get("search_by", self.search_by),
        )
        return conversation, self.asked(given, constraint=constraint_of(kwargs.get("response_format")))
