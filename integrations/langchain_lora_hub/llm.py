"""``LoraRetrieverLLM``: a LangChain model that answers each prompt with its own retrieved and composed adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, PrivateAttr

from lora_hub_sdk.faces.answer_fields import CALL, MODEL, PROMPT, ROUTING, SAMPLING, AnswerFields
from lora_hub_sdk.models import canonical_name, weights_fingerprint
from lora_hub_sdk.types import Completion, Usage


class LoraRetrieverLLM(AnswerFields, BaseLLM):
    """Finds for each prompt the adapters that fit, composes them, and answers all prompts of a call in one batch.

    ``invoke``, ``batch``, ``ainvoke``, ``abatch``, ``stream`` and ``astream`` work as with any LangChain model; all
    calls at one time, from threads and tasks, share the engine's batches. The asynchronous ones never block the event
    loop, and cancelling their task gives their prompts up.

    Fields of routing and sampling may be given anew with each call (``llm.invoke(prompt, strategy="fusion", k=2)``).
    Every generation tells its route in ``generation_info["route"]``: ``{"strategy": ..., "adapters": [{"name",
    "repo_id", "revision", "score", "weight"}, ...]}``; no adapters there means that the base model answered. Beside it,
    ``["tiers"]`` tells where each of them was found ("device", "host" or "disk"), and ``["timing"]`` where the time
    went, in seconds (``Timing``). ``["base_model"]`` is the model that answered, by its canonical name.

    ``config={"configurable": {"namespace": ...}}`` sets the namespace of one call, also through a chain: a server hands
    its caller's namespace over this way, and the call sees no other adapters.

    Raises:
        UnknownStrategyError, ConfigurationError: at construction, for values that no call could use.
    """

    model_config = ConfigDict(extra="forbid")

    _identity: dict[str, Any] | None = PrivateAttr(None)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.use_fields()

    @property
    def _llm_type(self) -> str:
        return "lora-retriever"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The key of LangChain's cache: everything that may change an answer, the registry's content included."""
        if self._identity is not None:
            return self._identity
        fields = {name: getattr(self, name) for name in (*ROUTING, *SAMPLING, *PROMPT, *MODEL)}
        if callable(self.template):
            fields["template"] = f"{self.template.__module__}.{self.template.__qualname__}@{id(self.template)}"
        bases = self._bases() if self.base_model is None else (self.base_model,)
        if self.strategy == "ramole":
            fields["gates"] = {name: gate.digest for name, gate in self.hub.gates.items()}
        return {"base_models": [_known_by(base) for base in bases], "registry": self.hub.digest, **fields}

    def invoke(
        self,
        input: LanguageModelInput,  # noqa: A002 (the name is LangChain's)
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        return super().invoke(input, config, stop=stop, **_with_namespace(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> str:
        return await super().ainvoke(input, config, stop=stop, **_with_namespace(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        yield from super().stream(input, config, stop=stop, **_with_namespace(config, kwargs))

    async def astream(
        self,
        input: LanguageModelInput,  # noqa: A002
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        known = await self._identified()
        pieces: Any = super(LoraRetrieverLLM, known).astream(
            input, config, stop=stop, **_with_namespace(config, kwargs)
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        answers: dict[int, str] = {}
        for places, chosen, configs, named in _by_namespace(inputs, config, kwargs):
            found = super().batch(chosen, configs, return_exceptions=return_exceptions, **named)
            answers.update(zip(places, found, strict=True))
        return [answers[place] for place in range(len(inputs))]

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        answers: dict[int, str] = {}
        for places, chosen, configs, named in _by_namespace(inputs, config, kwargs):
            found = await super().abatch(chosen, configs, return_exceptions=return_exceptions, **named)
            answers.update(zip(places, found, strict=True))
        return [answers[place] for place in range(len(inputs))]

    def generate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        # LangChain's cache knows a model's fields but not what is given for one call, and would answer one namespace's
        # question with another's answer. So what is given becomes a field.
        named, rest = self._taken(kwargs)
        return super(LoraRetrieverLLM, named).generate(prompts, stop, callbacks, **rest)

    async def agenerate(
        self, prompts: list[str], stop: list[str] | None = None, callbacks: Any = None, **kwargs: Any
    ) -> LLMResult:
        named, rest = self._taken(kwargs)
        known = await named._identified()
        return await super(LoraRetrieverLLM, known).agenerate(prompts, stop, callbacks, **rest)

    def _taken(self, kwargs: dict[str, Any]) -> tuple[LoraRetrieverLLM, dict[str, Any]]:
        """This model with what is given for one call, and what of it is LangChain's."""
        own = {name: value for name, value in kwargs.items() if name in CALL}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        if own.get("bases", self.bases) == "loaded":
            # Which they are must be the same where the cache is asked and where the prompt is routed.
            own["bases"] = self.hub.loaded_bases(self.settings) or "loaded"
        return (self.model_copy(update=own) if own else self), rest

    async def _identified(self) -> LoraRetrieverLLM:
        """This model for one call, with its identity: LangChain asks for it on the event loop, and it asks SQL."""
        known = self.model_copy()
        known._identity = await asyncio.to_thread(lambda: self._identifying_params)
        return known

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(self.hub.generate(prompts, **self.asked(kwargs, stop)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(await self.hub.agenerate(prompts, **self.asked(kwargs, stop)))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self.hub.stream(prompt, **self.asked(kwargs, stop))) as pieces:
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
        async with aclosing(self.hub.astream(prompt, **self.asked(kwargs, stop))) as pieces:
            async for piece in pieces:
                chunk = _chunk(piece)
                if chunk.text and run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _result(self, completions: list[Completion]) -> LLMResult:
        return LLMResult(
            generations=[
                [Generation(text=completion.text, generation_info=_info(completion))] for completion in completions
            ],
            llm_output={"model_name": self._model_name(completions), "token_usage": _usage(completions)},
        )

    def _bases(self) -> Sequence[str | Path]:
        """What may be chosen where no base model is asked for."""
        if isinstance(self.bases, str):
            return self.hub.loaded_bases(self.settings)
        return self.hub.base_models() if self.bases is None else self.bases

    def _model_name(self, completions: list[Completion]) -> str:
        if self.base_model is not None:
            return str(self.base_model)
        return ", ".join(sorted({completion.trace.base_model for completion in completions}))


def _known_by(base_model: str | Path) -> str:
    """A model's name, and what is in it where that is a folder, of which a name says nothing."""
    base = canonical_name(base_model)
    return f"{base}@{weights_fingerprint(Path(base))}" if Path(base).is_dir() else base


def _with_namespace(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    namespace = (config or {}).get("configurable", {}).get("namespace")
    return kwargs if namespace is None else {"namespace": namespace, **kwargs}


def _by_namespace(
    inputs: list[LanguageModelInput], config: RunnableConfig | list[RunnableConfig] | None, kwargs: dict[str, Any]
) -> Iterator[tuple[list[int], list[LanguageModelInput], list[RunnableConfig], dict[str, Any]]]:
    """The parts of a batch that share a namespace: their places, inputs and configs, and the keywords of their call."""
    configs = get_config_list(config, len(inputs))
    groups: dict[Any, list[int]] = {}
    for place, own in enumerate(configs):
        groups.setdefault(_with_namespace(own, kwargs).get("namespace"), []).append(place)
    for places in groups.values():
        chosen, of = [inputs[place] for place in places], [configs[place] for place in places]
        yield places, chosen, of, _with_namespace(of[0], kwargs)


def _chunk(piece: str | Completion) -> GenerationChunk:
    """A piece of text; the completion at the end has the facts."""
    if isinstance(piece, Completion):
        return GenerationChunk(text="", generation_info=_info(piece))
    return GenerationChunk(text=piece)


def _info(completion: Completion) -> dict[str, Any]:
    trace = completion.trace
    return {
        "finish_reason": completion.finish_reason,
        "base_model": trace.base_model,
        "route": trace.route.as_dict(),
        "tiers": list(trace.tiers),
        "timing": None if trace.timing is None else trace.timing.as_dict(),
        "truncated_tokens": trace.truncated_tokens,
        "token_usage": completion.usage.as_dict(),
    }


def _usage(completions: list[Completion]) -> dict[str, int]:
    return Usage(
        sum(completion.usage.prompt_tokens for completion in completions),
        sum(completion.usage.completion_tokens for completion in completions),
    ).as_dict()
