"""What travels between the rooms: frozen, plain, free of tensors.

``Adapter`` (what exists) -> ``Hit`` (adapter, score) -> ``Route`` (one prompt: adapters and weights)
-> ``Plan`` (one batch: unique adapters p and the mapping matrix M) -> ``Completion`` (text, usage, ``Trace``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, TypedDict

from lora_hub_sdk.messages import InvalidToolCall, ToolCall

#: Where a route's adapters are averaged: in the outputs of each layer, in the parameters A and B, in the outputs with
#: weights that a gate finds for each token and layer, or in the parameters with those of each prompt and layer.
Averaged = Literal["outputs", "parameters", "tokens", "prompt"]
#: Those whose weights come from a gate.
GATED: Final = frozenset({"tokens", "prompt"})
#: Where adapters are registered and searched unless a caller says otherwise.
DEFAULT_NAMESPACE: Final = "default"
FinishReason = Literal["stop", "length"]
#: Where an adapter's factors were when a request needed them: with the model, in the host's memory, or in its files.
Tier = Literal["device", "host", "disk"]
#: A retired adapter is kept, and neither searched nor used until it is restored.
AdapterState = Literal["active", "retired"]
#: What an adapter's vector was made from: samples that somebody gave, a vector that its owner gave, examples found
#: through its card, or, where there was nothing, a guess from its weights and its card's text.
Origin = Literal["samples", "owner", "card", "guess"]
Trust = Literal["high", "medium", "low"]
#: How far a score of a search can be trusted, by what the adapter's vector was made from.
TRUST: Final[dict[Origin, Trust]] = {"samples": "high", "owner": "high", "card": "medium", "guess": "low"}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registered LoRA at one exact content.

    ``revision`` is always 40 hex digits: the commit on the Hub, or, for a local folder, the head of ``digest``.
    ``digest`` is the sha256 over configuration and weights; the engine refuses files that no longer have it.
    ``rank`` is the largest rank of any module; ``alpha`` the configured ``lora_alpha``. ``tags`` are the card's and
    those given at registration. ``sample_count`` samples made the vector, whether or not their texts were kept. A
    ``pinned`` adapter is held at its revision.
    """

    id: int
    name: str
    namespace: str
    repo_id: str
    revision: str
    digest: str
    base_model: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size_bytes: int
    license: str | None
    description: str | None
    tags: tuple[str, ...]
    folder: Path
    sample_count: int
    created_at: datetime
    updated_at: datetime
    state: AdapterState = "active"
    pinned: bool = False
    origin: Origin = "samples"


@dataclass(frozen=True, slots=True)
class Score:
    """How an adapter did at a task: measured once, by somebody, on one content.

    ``current`` tells whether it was measured on the content that the adapter has now; only such scores can be
    searched by.
    """

    task: str
    metric: str
    value: float
    revision: str
    recorded_at: datetime
    current: bool


@dataclass(frozen=True, slots=True)
class Event:
    """Who did what to which adapter, and when. ``detail`` holds plain facts, as the revisions of an update."""

    id: int
    at: datetime
    actor: str
    action: str
    namespace: str
    name: str
    detail: dict[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class MinScore:
    """Only adapters that reached ``value`` at a task, by a score recorded for their current content."""

    task: str
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class AdapterFilter:
    """Which adapters a search may return; ``base_model`` in canonical spelling.

    ``tags``: those that carry all of them; ``licenses``: one of them; ``exclude``: none of these names; ``scores``: all
    of them; ``min_trust``: vectors of at least that origin; ``bases``: for one of these base models.
    """

    namespace: str = DEFAULT_NAMESPACE
    base_model: str | None = None
    tags: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    scores: tuple[MinScore, ...] = ()
    min_trust: Trust = "low"
    bases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer of a search. ``score`` is the cosine in [-1, 1], higher is nearer.

    ``relevance`` is what a reranker ordered the hits by, comparable within one search only; None where the cosine did.
    """

    adapter: Adapter
    score: float
    relevance: float | None = None

    @property
    def trust(self) -> Trust:
        """ "low" where the adapter's vector was guessed from its weights and card, "medium" where it comes from
        examples of its card."""
        return TRUST[self.adapter.origin]


@dataclass(frozen=True, slots=True)
class Member:
    """One adapter of a route. ``score`` is None where the caller named the adapter instead of searching."""

    adapter: Adapter
    weight: float
    score: float | None = None


class MemberDict(TypedDict):
    name: str
    repo_id: str
    revision: str
    score: float | None
    weight: float


class RouteDict(TypedDict):
    strategy: str
    adapters: list[MemberDict]


@dataclass(frozen=True, slots=True)
class Route:
    """How one prompt is answered. No members means: the base model answers, and that was asked for.

    ``base_model`` is the canonical name of the model that answers; routes that were made by hand may leave it out.
    """

    strategy: str
    averaged: Averaged
    members: tuple[Member, ...] = ()
    base_model: str = field(default="", compare=False)

    def as_dict(self) -> RouteDict:
        """The stable form shown to users, as in LangChain's ``generation_info["route"]``."""
        return {
            "strategy": self.strategy,
            "adapters": [
                {
                    "name": member.adapter.name,
                    "repo_id": member.adapter.repo_id,
                    "revision": member.adapter.revision,
                    "score": member.score,
                    "weight": member.weight,
                }
                for member in self.members
            ],
        }


@dataclass(frozen=True, slots=True)
class Routing:
    """How prompts are routed; one value for all prompts of a call.

    ``adapters`` names the route's adapters and skips the search; an empty tuple is no route at all and is refused.
    ``min_score`` drops hits below that cosine; a prompt that keeps none is answered by the base model. "auto" drops
    what does not fit by the bound that ``hub.calibrate`` found, which also goes by shared words.
    ``rerank``: whether the nearest come in the order of their words too; None leaves it to the hub.
    ``bases``: where no base model is asked for, those of which each prompt takes the one of its nearest adapter: by
    name, "loaded" for those that have an engine, or None for all.
    ``weights``: "uniform", "similarity", or "fitted", "sparse" or "gate" as ``hub.fit_weights`` found them.
    ``adapter_weights``: one for each of ``adapters``, any finite numbers; None weighs these alike.
    """

    strategy: str = "mixture"
    k: int = 3
    weights: str = "uniform"
    min_score: float | Literal["auto"] | None = None
    adapters: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    namespace: str = DEFAULT_NAMESPACE
    tags: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    scores: tuple[MinScore, ...] = ()
    min_trust: Trust = "low"
    rerank: bool | None = None
    bases: tuple[str, ...] | Literal["loaded"] | None = None
    adapter_weights: tuple[float, ...] | None = None

    def allowed(self, base_model: str | None) -> AdapterFilter:
        """The adapters that a search for a route may return; without a base model, those for any of ``bases``."""
        assert self.bases != "loaded", "whoever knows the engines has put their names here"
        bases = () if base_model is not None or self.bases is None else tuple(self.bases)
        return AdapterFilter(
            self.namespace, base_model, self.tags, self.licenses, self.exclude, self.scores, self.min_trust, bases
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """One batch: b rows over p unique adapters (paper section 4.3).

    ``matrix`` is the mapping matrix M, b rows of p weights; a zero row is answered by the base model.
    ``averaged`` tells for each row where its weights apply.
    """

    adapters: tuple[Adapter, ...]
    matrix: tuple[tuple[float, ...], ...]
    averaged: tuple[Averaged, ...]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's text has to be; tokens that would lead away from it are never chosen.

    ``text`` is a JSON schema ("json_schema"), a regular expression of the whole answer ("regex"), a grammar in the
    form of llguidance's Lark ("lark"), or nothing ("json": any JSON object).
    """

    kind: Literal["json", "json_schema", "regex", "lark"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen for one row. ``temperature=0`` is greedy; ``seed`` makes a row repeatable by itself.

    Where a conversation has tools, ``constraint`` is for the answers that are no calls.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one row; ``completion_tokens`` counts an end-of-text token that the model produced."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, int]:
        """The three counts by name, as users are shown them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }


@dataclass(frozen=True, slots=True)
class Timing:
    """Where one request's time went, in seconds.

    ``queue_s`` (submitted until admitted, adapters' loading included), ``prefill_s`` and ``decode_s`` follow one
    another; ``load_s`` is the part of the queue in which adapters were read. ``first_token_s`` and ``total_s`` count
    from the submission; ``first_token_s`` is 0 where no token came.
    """

    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """The six durations by name, as users are shown them."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Trace:
    """How a completion came about. ``truncated_tokens`` were cut from the front of the prompt's text.

    ``tiers`` tells of each of the route's adapters, in order, where it was found. Neither it nor ``timing`` counts when
    completions are compared: they differ from call to call.
    """

    route: Route
    batch_size: int
    truncated_tokens: int = 0
    timing: Timing | None = field(default=None, compare=False)
    tiers: tuple[Tier, ...] = field(default=(), compare=False)

    @property
    def base_model(self) -> str:
        """The canonical name of the model that answered; empty where the route was made by hand and names none."""
        return self.route.base_model


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``finish_reason`` is "stop" (end of text or a stop string) or "length".

    Where the prompt was a conversation with tools, ``text`` is what stands beside the calls.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    trace: Trace
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()

    @property
    def outcome(self) -> Literal["stop", "length", "tool_calls"]:
        """How it ended, in the words of OpenAI's interface: "tool_calls" where it is complete and calls tools."""
        return "tool_calls" if self.tool_calls and self.finish_reason == "stop" else self.finish_reason
