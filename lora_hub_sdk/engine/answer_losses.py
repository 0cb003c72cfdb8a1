"""How likely wanted answers are under adapters with fixed weights: what a search over weights, or a choice, goes by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_hub_sdk.engine._gate_rows import AnswerRow
from lora_hub_sdk.engine.expert_pool import AdapterSource, open_experts, unfusable
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Averaged

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.prompt import Template


@dataclass(frozen=True, slots=True)
class _Reading:
    template: Template
    max_tokens: int
    answer_tokens: int


class AnswerLosses:
    """Losses of some rows under any weights of some adapters; what is the same from call to call is kept.

    Args:
        hub: a ``LoraHub``.
        rows: (inputs, targets) each.
        adapters: names; they must be plain LoRAs of linear modules.
        max_tokens: what is read of a prompt, its last tokens.
        answer_tokens: what is read of an answer.
        batch: rows a pass.

    Raises:
        ConfigurationError: no rows or no adapters, a name of no adapter in service, or an adapter of another kind.
        As ``hub.engine``.
    """

    def __init__(
        self,
        hub: AdapterSource,
        rows: Sequence[tuple[str, str]],
        adapters: Sequence[str],
        *,
        base_model: str | os.PathLike[str],
        namespace: str = DEFAULT_NAMESPACE,
        template: Template = "auto",
        settings: ModelSettings | None = None,
        max_tokens: int = 256,
        answer_tokens: int = 64,
        batch: int = 16,
    ) -> None:
        if not rows or not adapters:
            raise ConfigurationError(
                f"{len(rows)} rows and {len(adapters)} adapters: expected one or more of both to measure losses"
            )
        from lora_hub_sdk.engine._encoded import Encoded
        from lora_hub_sdk.engine.expert_forward import ExpertForward

        base = hub.engine(base_model, settings).base
        experts = open_experts(hub, base, adapters, base_model=base_model, namespace=namespace, distinct=False)
        self._adapters = tuple(adapters)
        self._unfusable = [unfusable(factors) for factors in experts.factors]
        self._forward = ExpertForward(base, experts.factors)
        encoded = Encoded(_Reading(template, max_tokens, answer_tokens), base, [AnswerRow(*row) for row in rows])
        # Rows of one length have no padding among them.
        self._order = sorted(range(len(rows)), key=encoded.size)
        self._batches = [encoded.batch(self._order[start : start + batch]) for start in range(0, len(rows), batch)]

    def of(self, weights: Sequence[float], averaged: Averaged = "outputs") -> list[float]:
        """Mean of -log p over the tokens of each row's answer, its end included, in the order of the rows.

        Args:
            weights: one for each adapter, of any sign; an adapter of weight 0 costs nothing.
            averaged: "outputs", or "parameters" for the product of the factors' means (paper eq. 4).

        Raises:
            ConfigurationError: another number of weights than adapters, another way of averaging, or parameters of an
                adapter whose A and B are not known apart (PiSSA, OLoRA) that are averaged with others'.
        """
        if len(weights) != len(self._adapters):
            raise ConfigurationError(
                f"{len(weights)} weights for {len(self._adapters)} adapters: expected one for each"
            )
        if averaged not in ("outputs", "parameters"):
            raise ConfigurationError(f'averaged={averaged!r}: expected "outputs" or "parameters"')
        taken = [place for place, weight in enumerate(weights) if weight]
        if averaged == "parameters" and len(taken) > 1:
            for place in taken:
                if why := self._unfusable[place]:
                    raise ConfigurationError(f"adapter {self._adapters[place]!r} cannot be averaged with others: {why}")
        found = [0.0] * len(self._order)
        each = (
            loss for batch in self._batches for loss in self._forward.fixed_losses(batch, weights, averaged).tolist()
        )
        for row, loss in zip(self._order, each, strict=True):
            found[row] = loss
        return found
