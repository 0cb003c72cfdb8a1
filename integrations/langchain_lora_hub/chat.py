"""``ChatLoraRetriever``: a LangChain chat model that answers each conversation with its own retrieved adapters."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from typing import Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput, ModelProfile
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import ConfigDict

from langchain_lora_hub.answer_info import model_name, output_of
from langchain_lora_hub.gathering import read_aside
from langchain_lora_hub.hub_model import PROVIDER, HubModel
from langchain_lora_hub.messages import Chunks, conversation_of, message_of, metadata_of
from langchain_lora_hub.namespaces import with_namespace
from langchain_lora_hub.structured import (
    Method,
    Schema,
    check_method,
    response_format_of,
    structured,
    tool_of,
    traced,
)
from lora_hub_sdk.chat.openai_form import constraint_of, tool_choice_of, tools_of
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.messages import Conversation, SearchBy
from lora_hub_sdk.types import Completion

#: What one call may bring beside the fields. ``stream`` is LangChain's own.
_CHAT = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "stream")


class ChatLoraRetriever(HubModel[AIMessage], BaseChatModel):
    """Finds for each conversation the adapters that fit, composes them, and writes the assistant's next message.

    All ways of calling work as with any LangChain chat model, those of ``batch`` and the asynchronous ones without a
    thread for each conversation; all calls at one time share the engine's batches. Fields may be given anew with each
    call, and beside them ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``response_format`` in OpenAI's form,
    which ``bind_tools`` and ``with_structured_output`` make.

    Calls of tools are held to the tools' schemas while they are generated, and so are structured answers: a call can
    only be malformed where it was cut off by ``max_new_tokens``, and is one of ``invalid_tool_calls`` then. Text is the
    only kind of content.

    ``response_metadata`` has ``model_name``, ``finish_reason`` ("stop", "length" or "tool_calls"), and what
    ``LoraRetrieverLLM`` tells in ``generation_info``: the route, the base model, where the time went.
    ``config={"configurable": {"namespace": ...}}`` sets the namespace of one call, also through a chain.

    Raises:
        UnknownStrategyError, ConfigurationError: at construction, for values that no call could use.
    """

    model_config = ConfigDict(extra="forbid")

    #: Which text of a conversation finds the adapters: "last_user", "user", "all", or a function of the messages.
    search_by: SearchBy = "last_user"
    #: Whether ``invoke`` reads its answer as a stream, so that callbacks see each piece.
    streaming: bool = False

    @property
    def _llm_type(self) -> str:
        return "lora-retriever-chat"

    @property
    def _more_fields(self) -> tuple[str, ...]:
        return ("search_by",)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._ls_params("chat", stop, kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            tool_calling=True,
            tool_choice=True,
            tool_call_streaming=True,
            structured_output=True,
            reasoning_output=False,
        )
        if self.base_model is not None:
            profile["name"] = str(self.base_model)
            with suppress(Exception):  # a call tells what is wrong with the model; LangChain hides it here
                profile["max_input_tokens"] = self.hub.context(self.base_model)
        return profile

    # -- tools and structured answers ---------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools that it may call.

        Args:
            tools: whatever LangChain takes for a tool.
            tool_choice: "auto" (text or calls), "none", "any" or "required" (a call at least), a tool's name, True for
                "any", or OpenAI's object of a tool.
            parallel_tool_calls: False for one call at most.
            strict: as other models have it; calls are always held to their schemas.
            response_format: a schema for answers that are no calls.
            kwargs: any other options of a call.

        Raises:
            ConfigurationError: what is no tool, or no choice.
        """
        rows = [tool_of(tool, strict=strict) for tool in tools]
        named = {"any", "none", "auto", *(tool.name for tool in tools_of(rows))}
        if (choice := tool_choice_of(tool_choice)) not in named:
            raise ConfigurationError(f"tool_choice={tool_choice!r}: expected one of {', '.join(sorted(named))}")
        given = {
            "tools": rows or None,
            "tool_choice": None if tool_choice is None else choice,
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format_of(response_format, strict=strict),
        }
        return self.bind(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: Schema,
        *,
        method: Method = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model with answers in the form of a schema.

        Args:
            schema: a pydantic class, whose objects come out; or a JSON schema, a ``TypedDict`` or a tool in OpenAI's
                form, for dictionaries.
            method: "function_calling" has the model call a tool of that schema, "json_schema" holds its answer to it,
                and "json_mode" only to some JSON object.
            include_raw: give ``{"raw": message, "parsed": ..., "parsing_error": ...}``, and raise nothing.
            strict: as other models have it; schemas are always held to.
            kwargs: options of each call.

        Raises:
            ConfigurationError: an unknown method, or ``strict`` with "json_mode".
            OutputParserException: when called, for an answer that was cut off or that the schema's own checks refuse.
        """
        check_method(method, strict)
        options = {"ls_structured_output_format": traced(schema, method, strict), **kwargs}
        model: Runnable[LanguageModelInput, AIMessage]
        if method == "function_calling":
            name = tool_of(schema)["function"]["name"]
            model = self.bind_tools([schema], tool_choice=name, parallel_tool_calls=False, strict=strict, **options)
        elif method == "json_schema":
            model = self.bind(response_format=response_format_of(schema, strict=strict), **options)
        else:
            model = self.bind(response_format={"type": "json_object"}, **options)
        return structured(model, schema, method, include_raw=include_raw)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """How many tokens the messages are for the base model, with what its template adds and tells of the tools.

        Raises:
            ConfigurationError: no base model is named; or messages, or tools, that are none.
        """
        return self._count(self._prompt(messages, {"tools": [tool_of(tool) for tool in tools or ()]}), self.template)

    # -- one conversation ---------------------------------------------------------------------------------------------

    def _taken(self, kwargs: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        named, rest = super()._taken(kwargs)
        # Caches know classes and objects by names that others may have as well.
        if rest.get("tools") is not None:
            rest["tools"] = [tool_of(tool) for tool in rest["tools"]]
        if rest.get("response_format") is not None:
            rest["response_format"] = response_format_of(rest["response_format"])
        return named, rest

    def _options(self, rest: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in rest.items() if name not in _CHAT}

    def _prompt(self, given: LanguageModelInput, rest: Mapping[str, Any]) -> Conversation:
        parallel = rest.get("parallel_tool_calls")
        return Conversation.of(
            conversation_of(self._convert_input(given).to_messages()),
            tools=tools_of(rest.get("tools")),
            tool_choice=tool_choice_of(rest.get("tool_choice")),
            parallel_tool_calls=True if parallel is None else parallel,
            search_by=self.search_by,
        )

    def _asked(
        self, messages: list[BaseMessage], given: dict[str, Any], stop: list[str] | None
    ) -> tuple[Conversation, dict[str, Any]]:
        named, rest = self._taken(given)
        constraint = constraint_of(rest.get("response_format"))
        return named._prompt(messages, rest), named.asked(named._options(rest), stop, constraint)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        prompt, asked = self._asked(messages, kwargs, stop)
        (completion,) = self.hub.generate([prompt], **asked)
        return _result(completion, asked["base_model"])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        prompt, asked = self._asked(messages, kwargs, stop)
        (completion,) = await self._answers([prompt], asked)
        return _result(completion, asked["base_model"])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        prompt, asked = self._asked(messages, kwargs, stop)
        chunks = Chunks()
        with closing(self.hub.stream(prompt, **asked)) as pieces:
            for piece in pieces:
                chunk = _chunk(piece, chunks, asked["base_model"])
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        self._leave_batch()
        prompt, asked = self._asked(messages, kwargs, stop)
        chunks = Chunks()
        async with aclosing(self.hub.astream(prompt, **asked)) as pieces:
            async for piece in pieces:
                chunk = _chunk(piece, chunks, asked["base_model"])
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    # -- what LangChain calls -----------------------------------------------------------------------------------------

    def generate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        if len(messages) > 1:  # LangChain would have one answered after the other

            async def together() -> AsyncGenerator[LLMResult]:
                yield await self.agenerate(messages, stop, callbacks, **kwargs)

            return next(read_aside(together))
        named, rest = self._taken(kwargs)
        return super(ChatLoraRetriever, named).generate(messages, stop, callbacks, **rest)

    async def agenerate(
        self, messages: list[list[BaseMessage]], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        named, rest = self._taken(kwargs)
        known = await named._identified()
        return await super(ChatLoraRetriever, known).agenerate(messages, stop, callbacks, **rest)

    def stream_events(
        self,
        input: LanguageModelInput,  # noqa: A002 (the name is LangChain's)
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        return super().stream_events(input, config, **with_namespace(config, kwargs))

    def astream_events(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        given = with_namespace(config, kwargs)
        if kwargs.get("version") != "v3":
            return super().astream_events(input, config, **given)

        async def opened() -> Any:
            known = await self._identified()
            return await super(ChatLoraRetriever, known).astream_events(input, config, **given)

        return opened()

    def _combine_llm_outputs(self, outputs: list[dict[str, Any] | None], /) -> dict[str, Any]:
        told = [output for output in outputs if output]
        if not told:  # all were in the cache
            return {}
        names = sorted({output["model_name"] for output in told})
        usages = [output["token_usage"] for output in told]
        total = {name: sum(usage[name] for usage in usages) for name in usages[0]}
        return {"model_name": ", ".join(names), "token_usage": total}


def _result(completion: Completion, base_model: Any) -> ChatResult:
    metadata = _metadata(completion, base_model)
    generation = ChatGeneration(message=message_of(completion, metadata), generation_info=dict(metadata))
    return ChatResult(generations=[generation], llm_output=output_of(base_model, [completion]))


def _chunk(piece: Any, chunks: Chunks, base_model: Any) -> ChatGenerationChunk:
    if not isinstance(piece, Completion):
        return ChatGenerationChunk(message=chunks.of(piece))
    metadata = _metadata(piece, base_model)
    return ChatGenerationChunk(message=chunks.last(piece, metadata), generation_info=dict(metadata))


def _metadata(completion: Completion, base_model: Any) -> dict[str, Any]:
    return metadata_of(completion, model_name=model_name(base_model, [completion]), model_provider=PROVIDER)
