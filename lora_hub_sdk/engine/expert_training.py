"""Gates over a fixed set of experts: directions that are trained on answers, or found in the factors (Arrow)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.expert_gate import RULES, ExpertGate
from lora_hub_sdk.engine._gate_rows import Rows, hold_out, plan_rows, read_answer_rows
from lora_hub_sdk.engine._recipe import Recipe
from lora_hub_sdk.engine.expert_pool import AdapterSource, Experts, finished, new_file, open_experts
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Averaged

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.composition.expert_gate import GateRule
    from lora_hub_sdk.engine._gate_forward import GateBatch
    from lora_hub_sdk.engine._gate_rows import AnswerRow
    from lora_hub_sdk.engine._training import Course
    from lora_hub_sdk.engine.base_model import BaseModel

#: The strategies whose directions are computed and not trained.
_COMPUTED: Final = frozenset({"arrow"})


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """How a gate came about; what only a training has is empty where directions were computed.

    Attributes:
        file: the gate.
        digest: of that file.
        strategy: that answers with it.
        experts: names of the adapters, in the order of their scores.
        skipped: why each other adapter of the base model is none, by name, where none were named.
        rows: how many it was trained on.
        held_out: how many other ones its validation losses are of.
        steps: how many.
        seconds: of this run; 0 where the training had ended before.
        losses: of each step; with the noise, where experts are drawn.
        validation: (steps done, loss) on the held-out rows.
        uniform_loss: of these rows where all experts are weighed alike.
    """

    file: Path
    digest: str
    strategy: str
    experts: tuple[str, ...]
    skipped: Mapping[str, str]
    rows: int
    held_out: int
    steps: int
    seconds: float
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    uniform_loss: float | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "file": str(self.file)}


@dataclass(frozen=True, kw_only=True)
class ExpertTrainer(Recipe):
    """Makes gates for the strategies over fixed experts, as in LoraRetriever's section 5.1.

    Directions begin at zero, where all experts weigh alike, and move by the language model's loss on answers; base and
    experts are frozen. Where the strategy takes few experts, Gumbel noise chooses between equal scores at first, so a
    start at zero favours nobody. Rows of a step are of similar length; all rows take turns.

    The attributes are those of ``Recipe``.
    """

    steps: int = 140
    learning_rate: float = 3e-3

    def fit(
        self,
        hub: AdapterSource,
        *,
        strategy: str,
        base_model: str | os.PathLike[str],
        output: str | os.PathLike[str],
        experts: Sequence[str] | None = None,
        rows: Rows | None = None,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> ExpertReport:
        """Make the gate of a strategy, and write one safetensors file.

        A run that was killed goes on from its last checkpoint when it is called again with the same arguments, and one
        that ended is not repeated. Until then there is a folder ``<output>.part`` beside the file.

        Args:
            strategy: a name of ``composition.expert_gate.RULES``.
            output: a new file, or that of the same training.
            experts: names of adapters in service, two or more; None is every one that a gate can weigh.
            rows: ``{"inputs", "targets"}`` each, or a file of such JSON lines. "arrow" takes none.

        Raises:
            ConfigurationError: a strategy without such a gate, fewer than two experts, an expert that a gate cannot
                weigh or that has another one's content, no rows or rows of another form, a file of something else, or
                anything of ``hub.engine``.
        """
        if strategy not in RULES:
            raise ConfigurationError(f"strategy {strategy!r} has no fixed experts; choose one of {', '.join(RULES)}")
        computed = strategy in _COMPUTED
        if computed != (rows is None):
            expected = "none: its directions are those of the adapters" if computed else '{"inputs", "targets"} each'
            raise ConfigurationError(f"rows with strategy {strategy!r}: expected {expected}")
        file = new_file(output)
        read = [] if rows is None else read_answer_rows(rows)
        base = hub.engine(base_model, self.settings).base
        fused = RULES[strategy].per == "prompt"
        found = open_experts(hub, base, experts, base_model=base_model, namespace=namespace, fused=fused)
        if len(found.adapters) < 2:
            why = "; ".join(f"{name}: {problem}" for name, problem in list(found.skipped.items())[:5])
            raise ConfigurationError(
                f"{len(found.adapters)} experts for base model {found.base_model!r} in namespace {namespace!r}: a gate "
                "weighs two or more" + (why and f" ({why})")
            )
        told = {
            "strategy": strategy,
            "recipe": None if computed else self.told(),
            "rows": hashlib.sha256(json.dumps([asdict(row) for row in read]).encode()).hexdigest(),
            "experts": list(found.digests.items()),
            "base_model": found.base_model,
        }
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        held = finished(file, ExpertGate.load, key)
        seconds = 0.0
        if held is None:
            if computed:
                held = _computed(strategy, found, key)
                held.save(file)
            else:
                part = file.with_name(file.name + ".part")
                part.mkdir(exist_ok=True)
                held, seconds = self._trained(strategy, base, found, read, part, key)
                held.save(file)
                shutil.rmtree(part, ignore_errors=True)
        return _report(file, held, found.skipped, seconds)

    def _trained(
        self, strategy: str, base: BaseModel, found: Experts, rows: Sequence[AnswerRow], folder: Path, key: str
    ) -> tuple[ExpertGate, float]:
        split = hold_out([""] * len(rows), self.validation, self.validation_rows, self.seed)
        directions, course = _learn(self, base, found, rows, split, RULES[strategy], folder, key)
        training = {
            "key": key,
            "recipe": self.told(),
            "rows": len(split[0]),
            "held_out": len(split[1]),
            **course.told(),
        }
        return ExpertGate(strategy, found.base_model, found.digests, directions, training), course.seconds


def _learn(
    recipe: ExpertTrainer,
    base: BaseModel,
    found: Experts,
    rows: Sequence[AnswerRow],
    split: tuple[Sequence[int], Sequence[int]],
    rule: GateRule,
    folder: Path,
    key: str,
) -> tuple[dict[str, Tensor], Course]:
    """Train directions for every module that an expert has; ``split`` are the rows to train on and to measure with."""
    import torch

    from lora_hub_sdk.engine._encoded import Encoded
    from lora_hub_sdk.engine._training import train
    from lora_hub_sdk.engine.expert_forward import ExpertForward

    forward = ExpertForward(base, found.factors)
    encoded = Encoded(recipe, base, rows)
    count = len(found.factors)
    directions = {
        path: torch.zeros(count, d_in, device=base.device, requires_grad=True) for path, d_in in forward.inputs.items()
    }
    kept, held = split
    sizes = [encoded.size(row) for row in kept]
    held = sorted(held, key=encoded.size)

    def mean(losses: Callable[[GateBatch], Tensor]) -> float | None:
        if not held:
            return None
        each: list[float] = []
        with torch.no_grad():
            for start in range(0, len(held), recipe.batch):
                each += losses(encoded.batch(held[start : start + recipe.batch])).tolist()
        return sum(each) / len(each)

    def before() -> dict[str, float | None]:
        averaged: Averaged = "parameters" if rule.per == "prompt" else "outputs"
        return {"uniform_loss": mean(lambda batch: forward.fixed_losses(batch, [1 / count] * count, averaged))}

    def loss(step: int) -> Tensor:
        dealt = plan_rows(sizes, step=step, batch=recipe.batch, seed=recipe.seed)
        noise = torch.Generator().manual_seed((recipe.seed << 32) + step)
        return forward.losses(encoded.batch([kept[place] for place in dealt]), directions, rule, noise).mean()

    course = train(
        recipe,
        directions,
        before=before,
        loss=loss,
        measured=lambda: mean(lambda batch: forward.losses(batch, directions, rule)),
        folder=folder,
        key=key,
    )
    return {path: tensor.detach().cpu() for path, tensor in directions.items()}, course


def _computed(strategy: str, found: Experts, key: str) -> ExpertGate:
    from lora_hub_sdk.composition.arrow import arrow_directions

    return ExpertGate(strategy, found.base_model, found.digests, arrow_directions(found.factors), {"key": key})


def _report(file: Path, gate: ExpertGate, skipped: Mapping[str, str], seconds: float) -> ExpertReport:
    told = gate.training
    losses = tuple(told.get("losses", ()))
    return ExpertReport(
        file=file,
        digest=gate.digest,
        strategy=gate.strategy,
        experts=tuple(gate.experts),
        skipped=dict(skipped),
        rows=told.get("rows", 0),
        held_out=told.get("held_out", 0),
        steps=len(losses),
        seconds=seconds,
        losses=losses,
        validation=tuple((step, loss) for step, loss in told.get("validation", ())),
        uniform_loss=told.get("uniform_loss"),
    )
