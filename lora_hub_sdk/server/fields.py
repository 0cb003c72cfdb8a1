"""The fields of bodies that several requests share, and how they become a routing and a sampling."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_hub_sdk.types import Sampling

#: Names of adapters and tags; no control characters, which databases refuse.
Name = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
Names = Annotated[list[Name], Field(max_length=256)]
#: Few and short: they are looked for after each token.
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1)]
#: A field of OpenAI's whose only value that this server honours is the one that changes nothing.
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[int, Field(ge=1, le=1)]
Empty = Annotated[dict[str, Any], Field(max_length=0)]

#: Below it the numbers of a division by the temperature overflow; what it would choose is the greedy token anyway.
_GREEDY_BELOW: Final = 1e-4


class Body(BaseModel):
    """Of the right types as they stand, without fields that nobody reads."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Chosen(Body):
    """Which model and adapters answer."""

    model: Annotated[
        Name,
        Field(
            description="auto (retrieve and compose), auto:<strategy>, the name of an adapter, or base for the base "
            "model alone."
        ),
    ] = "auto"
    strategy: Annotated[str | None, Field(max_length=64)] = None
    k: Annotated[int | None, Field(ge=1)] = None
    weights: Annotated[str | None, Field(max_length=64)] = None
    min_score: Literal["auto"] | Annotated[float, Field(ge=-1, le=1)] | None = None
    adapters: Annotated[list[Name] | None, Field(min_length=1, max_length=256)] = None
    exclude: Names | None = None
    tags: Names | None = None
    rerank: bool | None = None


class StreamOptions(Body):
    """What a stream brings beside the text."""

    include_usage: bool | None = None
    #: Padding against listeners who count bytes; we send none.
    include_obfuscation: bool | None = None


class Answered(Chosen):
    """How text is chosen; the same for prompts and for chat."""

    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=1 << 20, description="0 is off.")] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    #: "adapter" is the server's to choose: strangers' templates are programs that nothing ends.
    template: Literal["auto", "chat", "alpaca", "none"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Read by nobody, and changing no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Honoured only where they change nothing.
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Empty | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How tokens are chosen."""
        temperature = self.temperature or 0.0
        stop = self.stop or ()
        return Sampling(
            max_new_tokens,
            temperature if temperature >= _GREEDY_BELOW else 0.0,
            1.0 if self.top_p is None else self.top_p,
            self.top_k or 0,
            self.seed,
            (stop,) if isinstance(stop, str) else tuple(stop),
        )
