"""``LoraRetrieverLLM``: a LangChain model that answers each prompt with its own retrieved and composed adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict, Field

from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.engine.base_model import ModelSettings
from lora_hub_sdk.engine.sampling import check_sampling
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import canonical_name, weights_fingerprint
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Completion, Routing, Sampling, Usage

_ROUTING: Final = (
    "strategy",
    "k",
    "weights",
    "min_score",
    "adapters",
    "exclude",
    "namespace",
    "adapter_tags",
)
_SAMPLING: Final = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
_PROMPT: Final = ("template", "overflow")
_MODEL: Final = ("dtype", "device", "quantization")


class LoraRetrieverLLM(BaseLLM):
    """Finds for each prompt the adapters that fit, composes them, and answers all prompts of a call in one batch.

    ``invoke``, ``batch``, ``ainvoke``, ``abatch`` and ``stream`` work as with any LangChain model; ``batch`` of n
    prompts is one batch of the engine. Fields of routing and sampling may be given anew with each call
    (``llm.invoke(prompt, strategy="fusion", k=2)``). Every generation tells its route in ``generation_info["route"]``:
    ``{"strategy": ..., "adapters": [{"name", "repo_id", "revision", "score", "weight"}, ...]}``; no adapters there
    means that the base model answered.

    Raises:
        UnknownStrategyError, ConfigurationError: at construction, for values that no call could use.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    hub: LoraHub = Field(exclude=True)
    #: A folder, a Hub id, or "smollm2-135m-instruct".
    base_model: str | Path
    strategy: str = "mixture"
    k: int = 3
    weights: str = "uniform"
    #: Hits below this cosine are dropped; a prompt that keeps none is answered by the base model.
    min_score: float | None = None
    #: Names of registered adapters: pins the route and skips the search.
    adapters: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    namespace: str = DEFAULT_NAMESPACE
    #: Only adapters that carry all of these tags (``tags`` itself is LangChain's).
    adapter_tags: tuple[str, ...] = ()
    #: "auto": the tokenizer's chat template where it has one. None: the prompt goes in as it is.
    template: Literal["auto", "chat", "alpaca"] | Callable[[str], str] | None = "auto"
    #: A prompt longer than the context loses its front ("cut") or is refused.
    overflow: Literal["cut", "refuse"] = "cut"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantization: Literal["8bit", "4bit"] | None = None

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        # Here and not in a validator, which would wrap our errors into its own.
        self._call({})
        self._settings()

    @property
    def _llm_type(self) -> str:
        return "lora-retriever"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """The key of LangChain's cache: everything that may change an answer, the registry's content included."""
        fields = {name: getattr(self, name) for name in (*_ROUTING, *_SAMPLING, *_PROMPT, *_MODEL)}
        if callable(self.template):
            fields["template"] = f"{self.template.__module__}.{self.template.__qualname__}@{id(self.template)}"
        base = canonical_name(self.base_model)
        if Path(base).is_dir():  # a folder's name says nothing about what is in it
            base = f"{base}@{weights_fingerprint(Path(base))}"
        return {"base_model": base, "registry": self.hub.digest, **fields}

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        completions = self.hub.generate(
            prompts, base_model=self.base_model, settings=self._settings(), **self._call(kwargs, stop)
        )
        return LLMResult(
            generations=[
                [Generation(text=completion.text, generation_info=_info(completion))] for completion in completions
            ],
            llm_output={"model_name": str(self.base_model), "token_usage": _usage(completions)},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        pieces = self.hub.stream(
            prompt, base_model=self.base_model, settings=self._settings(), **self._call(kwargs, stop)
        )
        for piece in pieces:
            if isinstance(piece, Completion):
                yield GenerationChunk(text="", generation_info=_info(piece))
                continue
            chunk = GenerationChunk(text=piece)
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

    def _settings(self) -> ModelSettings:
        return ModelSettings(self.dtype, self.device, self.quantization)

    def _call(self, kwargs: dict[str, Any], stop: list[str] | None = None) -> dict[str, Any]:
        """What the hub is asked: this object's fields, with those given for one call in their place.

        Raises:
            ConfigurationError: a keyword that is no field, or a value that makes no sense.
        """
        unknown = sorted(kwargs.keys() - {*_ROUTING, *_SAMPLING, *_PROMPT})
        if unknown:
            raise ConfigurationError(
                f"{', '.join(unknown)}: cannot be given for one call; these can: "
                f"{', '.join((*_ROUTING, *_SAMPLING, *_PROMPT))}"
            )
        if stop is not None:
            kwargs = {**kwargs, "stop": stop}
        value = {name: kwargs.get(name, getattr(self, name)) for name in (*_ROUTING, *_SAMPLING, *_PROMPT)}
        value["tags"] = value.pop("adapter_tags")
        for name in ("adapters", "exclude", "tags", "stop"):
            value[name] = None if value[name] is None else tuple(value[name])
        sampling = Sampling(**{name: value[name] for name in _SAMPLING})
        routing = Routing(**{name: value[name] for name in (*_ROUTING[:-1], "tags")})
        check_sampling(sampling)
        check_routing(routing)
        return {
            "routing": routing,
            "sampling": sampling,
            "template": value["template"],
            "overflow": value["overflow"],
        }


def _info(completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish_reason,
        "route": completion.trace.route.as_dict(),
        "truncated_tokens": completion.trace.truncated_tokens,
        "token_usage": completion.usage.as_dict(),
    }


def _usage(completions: list[Completion]) -> dict[str, int]:
    return Usage(
        sum(completion.usage.prompt_tokens for completion in completions),
        sum(completion.usage.completion_tokens for completion in completions),
    ).as_dict()
