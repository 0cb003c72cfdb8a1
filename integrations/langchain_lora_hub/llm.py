"""``LoraRetrieverLLM``: a LangChain model that answers each prompt with its own retrieved and composed adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from langchain_lora_hub.answer_info import info_of, output_of
from langchain_lora_hub.hub_model import HubModel
from lora_hub_sdk.messages import Piece
from lora_hub_sdk.types import Completion


class LoraRetrieverLLM(HubModel[str], BaseLLM):
    """Finds for each prompt the adapters that fit, composes them, and answers all prompts of a call in one batch.

    ``invoke``, ``batch``, ``batch_as_completed``, ``stream`` and their asynchronous forms work as with any LangChain
    model; all calls at one time, from threads and tasks, share the engine's batches, and none takes a thread for each
    prompt. The asynchronous ones never block the event loop, and cancelling their task gives their prompts up. With
    ``return_exceptions=True`` a prompt that fails takes no other with it.

    Fields of routing and sampling may be given anew with each call (``llm.invoke(prompt, strategy="fusion", k=2)``).
    Every generation tells its route in ``generation_info["route"]``: ``{"strategy": ..., "adapters": [{"name",
    "repo_id", "revision", "score", "weight"}, ...]}``; no adapters there means that the base model answered. Beside it,
    ``["tiers"]`` tells where each of them was found ("device", "host" or "disk"), and ``["timing"]`` where the time
    went, in seconds (``Timing``). ``["base_model"]`` is the model that answered, by its canonical name. ``explain``
    gives the route without an answer.

    ``config={"configurable": {"namespace": ...}}`` sets the namespace of one call, also through a chain: a server hands
    its caller's namespace over this way, and the call sees no other adapters.

    Raises:
        UnknownStrategyError, ConfigurationError: at construction, for values that no call could use.
    """

    model_config = ConfigDict(extra="forbid")

    @property
    def _llm_type(self) -> str:
        return "lora-retriever"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._ls_params("llm", stop, kwargs)

    def _prompt(self, given: LanguageModelInput, rest: Mapping[str, Any]) -> str:
        return self._convert_input(given).to_string()

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        named, rest = self._taken(kwargs)
        return super(LoraRetrieverLLM, named).generate(prompts, stop, callbacks, **rest)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        named, rest = self._taken(kwargs)
        known = await named._identified()
        return await super(LoraRetrieverLLM, known).agenerate(prompts, stop, callbacks, **rest)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(self.hub.generate(prompts, **self._asked(kwargs, stop)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(await self._answers(prompts, self._asked(kwargs, stop)))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self.hub.stream(prompt, **self._asked(kwargs, stop))) as pieces:
            for piece in pieces:
                chunk = _chunk(piece)
                if chunk.text and run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        self._leave_batch()
        async with aclosing(self.hub.astream(prompt, **self._asked(kwargs, stop))) as pieces:
            async for piece in pieces:
                chunk = _chunk(piece)
                if chunk.text and run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _asked(self, given: dict[str, Any], stop: list[str] | None) -> dict[str, Any]:
        named, rest = self._taken(given)
        return named.asked(rest, stop)

    def _result(self, completions: list[Completion]) -> LLMResult:
        return LLMResult(
            generations=[
                [Generation(text=completion.text, generation_info=info_of(completion))] for completion in completions
            ],
            llm_output=output_of(self.base_model, completions),
        )


def _chunk(piece: Piece | Completion) -> GenerationChunk:
    """A piece of text; the completion at the end has the facts."""
    if isinstance(piece, Completion):
        return GenerationChunk(text="", generation_info=info_of(piece))
    assert isinstance(piece, str), "only conversations with tools are answered with calls"
    return GenerationChunk(text=piece)
