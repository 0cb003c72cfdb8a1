"""``LoraRetrieverLLM``: a LangChain model that answers each prompt with its own retrieved and composed adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, Final, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list
from pydantic import ConfigDict, Field, PrivateAttr

from lora_hub_sdk.composition.router import check_base
from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.engine.base_model import ModelSettings
from lora_hub_sdk.engine.call import check_timeout
from lora_hub_sdk.engine.sampling import check_sampling
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import canonical_name, weights_fingerprint
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Completion, MinScore, Routing, Sampling, Trust, Usage

_ROUTING: Final = (
    "strategy",
    "k",
    "weights",
    "min_score",
    "adapters",
    "adapter_weights",
    "exclude",
    "namespace",
    "licenses",
    "scores",
    "min_trust",
    "rerank",
    "bases",
    "adapter_tags",
)
_SAMPLING: Final = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
_PROMPT: Final = ("template", "overflow")
#: What may be given for one call. ``timeout_s`` changes no answer, so it is in no key of a cache.
_CALL: Final = (*_ROUTING, *_SAMPLING, *_PROMPT, "timeout_s")
_MODEL: Final = ("dtype", "device", "quantization")


class LoraRetrieverLLM(BaseLLM):
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

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    hub: LoraHub = Field(exclude=True)
    #: A folder, a Hub id, or "smollm2-135m-instruct". None leaves it to each prompt's nearest adapter.
    base_model: str | Path | None = None
    #: Where ``base_model`` is None, those that may be chosen: names, "loaded", or None for all.
    bases: tuple[str, ...] | Literal["loaded"] | None = None
    strategy: str = "mixture"
    k: int = 3
    #: "uniform", "similarity", or "fitted", "sparse" or "gate" as ``hub.fit_weights`` found them.
    weights: str = "uniform"
    #: Hits below this cosine are dropped; a prompt that keeps none is answered by the base model. "auto" drops those
    #: below the bound that ``hub.calibrate`` found.
    min_score: float | Literal["auto"] | None = None
    #: Names of registered adapters: pins the route and skips the search.
    adapters: tuple[str, ...] | None = None
    #: One for each of ``adapters``, any finite numbers; None weighs these alike.
    adapter_weights: tuple[float, ...] | None = None
    exclude: tuple[str, ...] = ()
    namespace: str = DEFAULT_NAMESPACE
    #: A file that ``hub.train_gate`` wrote, for strategy "ramole": the hub uses it for this base model from now on.
    gate: str | Path | None = None
    #: Only adapters that carry all of these tags (``tags`` itself is LangChain's).
    adapter_tags: tuple[str, ...] = ()
    #: Only adapters under one of these licences, and with all of these scores.
    licenses: tuple[str, ...] = ()
    scores: tuple[MinScore, ...] = ()
    #: "high" leaves out adapters whose vectors come from cards or guesses, "medium" guesses.
    min_trust: Trust = "low"
    #: Whether the nearest adapters come in the order of their words too; None is what the hub was opened with.
    rerank: bool | None = None
    #: "auto": the tokenizer's chat template where it has one. None: the prompt goes in as it is.
    template: Literal["auto", "chat", "alpaca", "adapter"] | Callable[[str], str] | None = "auto"
    #: A prompt longer than the context loses its front ("cut") or is refused.
    overflow: Literal["cut", "refuse"] = "cut"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    #: Seconds for a call's answers, routing and loading included; ``DeadlineExceededError`` after that.
    timeout_s: float | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantization: Literal["8bit", "4bit"] | None = None
    _identity: dict[str, Any] | None = PrivateAttr(None)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        # Here and not in a validator, which would wrap our errors into its own.
        self._call({})
        if self.gate is not None:
            self.hub.use_gate(self.gate, base_model=self.base_model)

    @property
    def _llm_type(self) -> str:
        return "lora-retriever"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The key of LangChain's cache: everything that may change an answer, the registry's content included."""
        if self._identity is not None:
            return self._identity
        fields = {name: getattr(self, name) for name in (*_ROUTING, *_SAMPLING, *_PROMPT, *_MODEL)}
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
        own = {name: value for name, value in kwargs.items() if name in _CALL}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        if own.get("bases", self.bases) == "loaded":
            # Which they are must be the same where the cache is asked and where the prompt is routed.
            own["bases"] = self.hub.loaded_bases(self._settings()) or "loaded"
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
        return self._result(self.hub.generate(prompts, **self._call(kwargs, stop)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(await self.hub.agenerate(prompts, **self._call(kwargs, stop)))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(self.hub.stream(prompt, **self._call(kwargs, stop))) as pieces:
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
        async with aclosing(self.hub.astream(prompt, **self._call(kwargs, stop))) as pieces:
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
            return self.hub.loaded_bases(self._settings())
        return self.hub.base_models() if self.bases is None else self.bases

    def _model_name(self, completions: list[Completion]) -> str:
        if self.base_model is not None:
            return str(self.base_model)
        return ", ".join(sorted({completion.trace.base_model for completion in completions}))

    def _settings(self) -> ModelSettings:
        return ModelSettings(self.dtype, self.device, self.quantization)

    def _call(self, kwargs: dict[str, Any], stop: list[str] | None = None) -> dict[str, Any]:
        """What the hub is asked: this object's fields, with those given for one call in their place.

        Raises:
            ConfigurationError: a keyword that is no field, or a value that makes no sense.
        """
        unknown = sorted(kwargs.keys() - {*_CALL})
        if unknown:
            raise ConfigurationError(
                f"{', '.join(unknown)}: cannot be given for one call; these can: {', '.join(_CALL)}"
            )
        if stop is not None:
            kwargs = {**kwargs, "stop": stop}
        value = {name: kwargs.get(name, getattr(self, name)) for name in _CALL}
        value["tags"] = value.pop("adapter_tags")
        for name in ("adapters", "adapter_weights", "exclude", "tags", "licenses", "scores", "stop"):
            value[name] = None if value[name] is None else tuple(value[name])
        if value["bases"] is not None and not isinstance(value["bases"], str):
            value["bases"] = tuple(value["bases"])
        sampling = Sampling(**{name: value[name] for name in _SAMPLING})
        routing = Routing(**{name: value[name] for name in (*_ROUTING[:-1], "tags")})
        check_sampling(sampling)
        check_routing(routing)
        check_base(self.base_model, routing)
        check_timeout(value["timeout_s"])
        return {
            "base_model": self.base_model,
            "settings": self._settings(),
            "routing": routing,
            "sampling": sampling,
            "template": value["template"],
            "overflow": value["overflow"],
            "timeout_s": value["timeout_s"],
        }


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
