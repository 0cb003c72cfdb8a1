"""What an engine is asked, and what becomes of it on its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

from lora_hub_sdk.composition.terms import RouteTerms
from lora_hub_sdk.engine.adapter_store import Held
from lora_hub_sdk.engine.batch_lora import RowLora
from lora_hub_sdk.engine.prompt import EncodedPrompt, Overflow, Template
from lora_hub_sdk.engine.row import Row
from lora_hub_sdk.engine.ticket import Ticket
from lora_hub_sdk.messages import Prompt
from lora_hub_sdk.types import Route, Sampling, Tier, Timing

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.composition.gates import Gate


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its route and how to answer it.

    Attributes:
        timeout_s: from the call on; an answer that is not complete by then is given up.
        client: whom it counts for where requests take turns; by default each call counts for itself.
    """

    prompt: Prompt
    route: Route
    sampling: Sampling = field(default_factory=Sampling)
    template: Template = "auto"
    overflow: Overflow = "cut"
    timeout_s: float | None = None
    client: str | None = None


@dataclass(eq=False, slots=True)
class Job:
    """A request inside the engine: only the thread that owns the model changes it once it was handed over."""

    id: int
    client: str
    request: Request
    prompt: EncodedPrompt
    row: Row
    ticket: Ticket
    #: The gate that its weights come from.
    gate: Gate | None = None
    submitted: float = field(default_factory=monotonic)
    held: Held | None = None
    terms: RouteTerms | None = None
    lora: RowLora | None = None
    #: What its gate found for its prompt, see ``RowLora``; it holds also where the job is placed again.
    kept: dict[tuple[str, ...], Tensor] | None = None
    tiers: tuple[Tier, ...] = ()
    load_s: float = 0.0
    admitted: float | None = None
    prefilled: float | None = None
    verified: bool = False
    widest: int = 1
    over: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """What is read before the next token: the prompt, and what was generated before a pass failed."""
        return (*self.prompt.ids, *self.row.tokens)

    def timing(self, now: float) -> Timing:
        """Where the time went until now."""
        admitted = self.admitted or now
        prefilled = self.prefilled or now
        return Timing(
            queue_s=admitted - self.submitted,
            load_s=self.load_s,
            prefill_s=prefilled - admitted,
            decode_s=now - prefilled,
            first_token_s=0.0 if self.prefilled is None else prefilled - self.submitted,
            total_s=now - self.submitted,
        )
