"""Gates over fixed experts: MoE soft, top 3 and top 1, and SMEAR over one for each cluster; Arrow over the pool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.tensor_file import write_whole
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.plain import why_not_plain
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from pathlib import Path

    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow
    from lora_hub_sdk.types import Adapter

#: Needs no rows: its directions are those of the adapters.
ARROW: Final = "arrow"
_FILE: Final = "experts.json"
#: Of a training: with 8 rows each, one pass over 20 rows of 28 tasks.
STEPS: Final = 70


@dataclass(frozen=True, slots=True)
class FixedExperts:
    """The strategy of its name, over the cluster experts or, for Arrow, over all that a gate can weigh.

    The gate is kept in ``<name>.safetensors``; a training that was killed goes on.

    Attributes:
        recipe: what ``ExpertTrainer`` is made with beside what the ground says.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"steps": STEPS})

    @property
    def learns(self) -> bool:
        return self.name != ARROW

    def prepare(self, ground: Ground) -> None:
        experts = self._experts(ground) if self.learns else None
        rows = [{"inputs": row.inputs, "targets": row.targets} for row in ground.training.rows]
        ground.folder.mkdir(parents=True, exist_ok=True)
        file = ground.folder / f"{self.name}.safetensors"
        ground.hub.train_experts(
            strategy=self.name,
            base_model=ground.base_model,
            output=file,
            experts=experts,
            rows=rows if self.learns else None,
            namespace=ground.namespace,
            **{**ground.recipe, **self.recipe},
        )
        ground.hub.use_gate(file, base_model=ground.base_model)

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        return [Routing(self.name, namespace=ground.namespace)] * len(rows)

    def _experts(self, ground: Ground) -> list[str]:
        ground.lessons(self.name)
        pool, by_domain = ground.pool(), cluster_experts(ground)
        # One adapter may be the best of two domains.
        names = [*{pool[name].digest: name for name in by_domain.values()}.values()]
        if len(names) < 2:
            raise ConfigurationError(
                f"system {self.name!r} chooses between experts of two or more domains, and {len(names)} of the domains "
                f"{', '.join(sorted(set(ground.training.domains.values())))} have an own adapter that is a plain LoRA"
            )
        return names


def cluster_experts(ground: Ground) -> dict[str, str]:
    """By domain of the training rows its expert's name: of its tasks' own adapters the one of the least answer loss.

    The loss is the mean over the domain's training rows. LoraRetriever's section 5.1 has one expert for each cluster
    and does not say which. A domain without an own adapter that is a plain LoRA is left out. Kept in ``experts.json``.

    Raises:
        ConfigurationError: an own adapter that is not in the pool.
    """
    own, domains = ground.own_adapters(ground.training.tasks), ground.training.domains
    candidates: dict[str, dict[str, Adapter]] = {}
    for task, adapter in own.items():
        if why_not_plain(ground, adapter) is None:
            candidates.setdefault(domains[task], {})[adapter.name] = adapter
    key, file = _key(ground, candidates), ground.folder / _FILE
    losses = _kept(file, key)
    if losses is None:
        losses = {domain: _losses(ground, domain, [*named]) for domain, named in sorted(candidates.items())}
        ground.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps({"key": key, "losses": losses}, indent=1) + "\n").encode())
    return {domain: min(found, key=lambda name: (found[name], name)) for domain, found in losses.items()}


def _losses(ground: Ground, domain: str, names: Sequence[str]) -> dict[str, float]:
    """Of each of a domain's own adapters alone, in nats a token."""
    from lora_hub_sdk.engine.answer_losses import AnswerLosses

    measured = AnswerLosses(
        ground.hub,
        [(row.inputs, row.targets) for row in ground.training.rows if row.domain == domain],
        names,
        base_model=ground.base_model,
        namespace=ground.namespace,
        template=ground.template,
        settings=ground.settings,
    )
    found = [measured.of([float(other == name) for other in names]) for name in names]
    return {name: sum(each) / len(each) for name, each in zip(names, found, strict=True)}


def _key(ground: Ground, candidates: Mapping[str, Mapping[str, Adapter]]) -> str:
    """Of everything that the losses depend on."""
    told = {
        "candidates": {
            domain: [(one.name, one.digest, one.base_model) for one in named.values()]
            for domain, named in candidates.items()
        },
        "rows": [astuple(row) for row in ground.training.rows],
        "ground": {name: str(value) for name, value in ground.recipe.items() if name in ("template", "settings")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _kept(file: Path, key: str) -> dict[str, dict[str, float]] | None:
    """What an earlier run measured of the same."""
    try:
        told = json.loads(file.read_text("utf-8"))
        return told["losses"] if told["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
