"""The options of an answer as the fields of a framework's model, and as what one call may bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_hub_sdk.composition.router import check_base
from lora_hub_sdk.composition.strategies import check_routing
from lora_hub_sdk.engine.base_model import ModelSettings
from lora_hub_sdk.engine.call import check_timeout
from lora_hub_sdk.engine.sampling import check_sampling
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Constraint, MinScore, Routing, Sampling, Trust

ROUTING: Final = (
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
SAMPLING: Final = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
PROMPT: Final = ("template", "overflow")
MODEL: Final = ("dtype", "device", "quantization")
#: What may be given for one call. ``timeout_s`` changes no answer, so it is in no key of a cache.
CALL: Final = (*ROUTING, *SAMPLING, *PROMPT, "timeout_s")


class AnswerFields(BaseModel):
    """Mixed into the models of frameworks. All of ``CALL`` may be given anew with each call."""

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
    #: Only adapters that carry all of these tags (``tags`` itself is LangChain's).
    adapter_tags: tuple[str, ...] = ()
    #: Only adapters under one of these licences, and with all of these scores.
    licenses: tuple[str, ...] = ()
    scores: tuple[MinScore, ...] = ()
    #: "high" leaves out adapters whose vectors come from cards or guesses, "medium" guesses.
    min_trust: Trust = "low"
    #: Whether the nearest adapters come in the order of their words too; None is what the hub was opened with.
    rerank: bool | None = None
    #: A file that ``hub.train_gate`` or ``hub.train_experts`` wrote: the hub uses it for its strategy and this base
    #: model from now on.
    gate: str | Path | None = None
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

    def use_fields(self) -> None:
        """Check the fields, and use the gate; a framework's model calls it at the end of its construction.

        Not a validator, which would wrap our errors into its own.

        Raises:
            UnknownStrategyError, ConfigurationError: values that no call could use.
        """
        self.asked({})
        if self.gate is not None:
            self.hub.use_gate(self.gate, base_model=self.base_model)

    @property
    def settings(self) -> ModelSettings:
        """How the base model is loaded."""
        return ModelSettings(self.dtype, self.device, self.quantization)

    def possible_bases(self) -> Sequence[str | Path]:
        """The base models of which one may answer: the one asked for, or those that a search may choose from now."""
        if self.base_model is not None:
            return (self.base_model,)
        if isinstance(self.bases, str):
            return self.hub.loaded_bases(self.settings)
        return self.hub.base_models() if self.bases is None else self.bases

    def asked(
        self, given: Mapping[str, Any], stop: Sequence[str] | None = None, constraint: Constraint | None = None
    ) -> dict[str, Any]:
        """The keywords of ``hub.generate``: the fields, with those given for one call in their place.

        Raises:
            ConfigurationError: a keyword that is no field, or a value that makes no sense.
        """
        unknown = sorted(given.keys() - {*CALL})
        if unknown:
            raise ConfigurationError(
                f"{', '.join(unknown)}: cannot be given for one call; these can: {', '.join(CALL)}"
            )
        value = {name: given.get(name, getattr(self, name)) for name in CALL}
        if stop is not None:
            value["stop"] = stop
        value["tags"] = value.pop("adapter_tags")
        for name in ("adapters", "adapter_weights", "exclude", "tags", "licenses", "scores", "stop"):
            value[name] = None if value[name] is None else tuple(value[name])
        if value["bases"] is not None and not isinstance(value["bases"], str):
            value["bases"] = tuple(value["bases"])
        sampling = Sampling(**{name: value[name] for name in SAMPLING}, constraint=constraint)
        routing = Routing(**{name: value[name] for name in (*ROUTING[:-1], "tags")})
        check_sampling(sampling)
        check_routing(routing)
        check_base(self.base_model, routing)
        check_timeout(value["timeout_s"])
        return {
            "base_model": self.base_model,
            "settings": self.settings,
            "routing": routing,
            "sampling": sampling,
            "template": value["template"],
            "overflow": value["overflow"],
            "timeout_s": value["timeout_s"],
        }
