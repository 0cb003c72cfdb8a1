"""Structured prediction by a JSON schema that every token is held to, instead of by a call of a tool."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from pydantic import BaseModel, ValidationError

from lora_hub_sdk.errors import UnusableAnswerError

dispatcher = get_dispatcher(__name__)


class SchemaPredictor(FunctionCallingLLM):
    """A model whose ``structured_predict`` and its kin ask for ``response_format``.

    Only where ``pydantic_program_mode`` is DEFAULT: FUNCTION and LLM are LlamaIndex's own, by a call, by instructions.
    """

    @dispatcher.span
    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As LlamaIndex's, by the schema of ``output_cls``.

        Raises:
            UnusableAnswerError: the answer was cut off, or breaks a rule of the class that no schema can tell.
        """
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            own: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return own
        _started(output_cls, prompt, prompt_args)
        messages = self._messages(prompt, prompt_args)
        return _ended(_read(output_cls, self.chat(messages, **_asking(output_cls, llm_kwargs))))

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As ``structured_predict``."""
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            own: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return own
        _started(output_cls, prompt, prompt_args)
        messages = self._messages(prompt, prompt_args)
        return _ended(_read(output_cls, await self.achat(messages, **_asking(output_cls, llm_kwargs))))

    # ``stream_structured_predict`` and ``astream_structured_predict`` go through these two.

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        responses = self.stream_chat(self._messages(prompt, prompt_args), **_asking(output_cls, llm_kwargs))

        def objects() -> Generator[Any, None, None]:
            growing = _Growing(output_cls)
            for response in responses:
                yield growing.take(response)

        return objects()

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        if self.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        responses = await self.astream_chat(self._messages(prompt, prompt_args), **_asking(output_cls, llm_kwargs))

        async def objects() -> AsyncGenerator[Any, None]:
            growing = _Growing(output_cls)
            async for response in responses:
                yield growing.take(response)

        return objects()

    def _messages(self, prompt: PromptTemplate, prompt_args: dict[str, Any]) -> list[ChatMessage]:
        return self._extend_messages(prompt.format_messages(llm=self, **prompt_args))


class _Growing:
    """An object as its JSON is written: with the fields that came by now, and at last as its class has it."""

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._output_cls = output_cls
        self._now: list[Any] | None = None

    def take(self, response: ChatResponse) -> Any:
        if response.raw is not None:
            return _read(self._output_cls, response)
        found = process_streaming_objects(response, self._output_cls, cur_objects=self._now)
        self._now = [found]
        return found


def _asking(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    schema = {"name": output_cls.__name__, "schema": output_cls.model_json_schema()}
    return {**(llm_kwargs or {}), "response_format": {"type": "json_schema", "json_schema": schema}}


def _read(output_cls: type[Model], response: ChatResponse) -> Model:
    text, raw = response.message.content or "", response.raw or {}
    try:
        return output_cls.model_validate_json(text)
    except ValidationError as error:
        if raw["finish_reason"] == "length":
            raise UnusableAnswerError(
                f"the JSON of a {output_cls.__name__} was cut off after {raw['usage']['completion_tokens']} "
                "tokens; raise max_new_tokens"
            ) from error
        raise UnusableAnswerError(f"the answer {text[:200]!r} is no {output_cls.__name__}: {error}") from error


def _started(output_cls: type[BaseModel], prompt: PromptTemplate, prompt_args: dict[str, Any]) -> None:
    dispatcher.event(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args))


def _ended(output: Model) -> Model:
    dispatcher.event(LLMStructuredPredictEndEvent(output=output))
    return output
