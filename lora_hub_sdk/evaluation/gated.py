"""RAMoLE (arXiv 2406.16989): what is retrieved for each prompt, weighed by a trained gate at each token and module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.evaluation.experts import STEPS
from lora_hub_sdk.evaluation.retrieved import masked
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow

_STRATEGY: Final = "ramole"


@dataclass(frozen=True, slots=True)
class RetrievedGate:
    """One gate for every ``k``, in and out of distribution: trained on the rows of all tasks with an own adapter.

    So out of distribution the task's own adapter is not searched, but the gate has seen the task. It is kept in
    ``ramole.safetensors``; a training that was killed goes on.

    Attributes:
        ood: see ``retrieved.masked``.
        recipe: what ``GateTrainer`` is made with beside what the ground says.
    """

    name: str = _STRATEGY
    k: int = 3
    ood: bool = False
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"steps": STEPS})

    @property
    def learns(self) -> bool:
        return True

    def prepare(self, ground: Ground) -> None:
        lessons = ground.lessons(self.name)
        own = ground.own_adapters(lessons.tasks)
        ground.folder.mkdir(parents=True, exist_ok=True)
        file = ground.folder / f"{_STRATEGY}.safetensors"
        ground.hub.train_gate(
            base_model=ground.base_model,
            output=file,
            rows=[
                {"inputs": row.inputs, "targets": row.targets, "adapter": own[row.task].name}
                for row in lessons.rows
                if row.task in own
            ],
            namespace=ground.namespace,
            **{**ground.recipe, **self.recipe},
        )
        ground.hub.use_gate(file, base_model=ground.base_model)

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        routing = Routing(_STRATEGY, k=self.k, namespace=ground.namespace)
        return [*masked(ground, rows, routing)] if self.ood else [routing] * len(rows)
