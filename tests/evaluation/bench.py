"""The package's hub over the tiny pool, and the plain model, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.expert_forward import ExpertForward
from lora_hub_sdk.engine.running import Model
from lora_hub_sdk.types import Route, Routing, Sampling
from tests.evaluation import reference
from tests.evaluation.pool import TASKS, Pool, make_pool
from tests.evaluation.reference import Delta, Lora, Plain
from tests.support import relative_error

TOKENS: Final = 8


@dataclass
class Bench:
    """The package's hub and the plain model side by side."""

    pool: Pool
    plain: Plain
    loras: dict[str, Lora]
    #: What each pass of the engine returned, (rows, vocabulary).
    passes: list[Tensor] = field(default_factory=list)

    def several(self, *names: str) -> list[Lora]:
        return [self.loras[name] for name in names]

    def of(self, route: Route) -> tuple[list[Lora], list[float]]:
        return self.several(*(one.adapter.name for one in route.members)), [one.weight for one in route.members]

    def texts(self, prompts: Sequence[str], routing: Routing | Sequence[Routing]) -> list[str]:
        found = self.pool.hub.generate(prompts, base_model=self.pool.base, routing=routing, sampling=Sampling(TOKENS))
        return [one.text for one in found]

    @property
    def prompts(self) -> list[str]:
        """One of each task."""
        return [row.inputs for row in self.pool.questions.rows[: len(TASKS)]]

    @property
    def linears(self) -> dict[str, torch.nn.Linear]:
        modules = self.plain.model.named_modules()
        return {path: module for path, module in modules if isinstance(module, torch.nn.Linear)}

    def expert_forward(self, names: Sequence[str]) -> ExpertForward:
        hub = self.pool.hub
        return ExpertForward(hub.engine(self.pool.base).base, [load_factors(hub.get(name)) for name in names])

    def check(self, prompts: Sequence[str], routings: Sequence[Routing], deltas: Sequence[Delta]) -> None:
        """All prompts in one batch, and the first of them alone, answer as the deltas do, one by one."""
        want = [self.plain.answer(prompt, delta, TOKENS) for prompt, delta in zip(prompts, deltas, strict=True)]
        found = self.texts(prompts, routings)
        wrong = [
            (prompt, text, other)
            for prompt, text, (other, _) in zip(prompts, found, want, strict=True)
            if text != other
        ]
        assert not wrong, f"in one batch: {wrong}"
        self.passes.clear()
        self.texts(prompts[:1], routings[0])
        error = relative_error(torch.cat(self.passes), want[0][1])
        # A sharp gate makes more of a rounded input than a layer does.
        assert error < 1e-3, f"alone, the logits differ by {error} of the largest"


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    pool = make_pool(tmp_path_factory.mktemp("pool"), base)
    made = Bench(pool, Plain(base), {name: Lora.read(folder) for name, folder in pool.folders.items()})
    forward = Model.forward

    def recorded(self: Model, *given: Any, **other: Any) -> Tensor:
        logits = forward(self, *given, **other)
        made.passes.append(logits)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "forward", recorded)
        yield made
    pool.hub.close()


def by_experts(bench: Bench, gate: ExpertGate, names: Sequence[str] | None = None) -> Delta:
    """The definition with the gate's directions; ``names`` are those of its experts that take part."""
    experts = list(gate.experts)
    names = names or experts
    places = [experts.index(name) for name in names]
    directions = {path: torch.zeros(len(names), one.in_features) for path, one in bench.linears.items()}
    directions |= {path: rows[places] for path, rows in gate.directions.items()}
    if gate.strategy == "smear":
        return reference.smear(bench.several(*names), directions)
    top = {"moe-top1": 1, "moe-top3": 3, "arrow": 3}.get(gate.strategy)
    return reference.experts(bench.several(*names), directions, top=top, absolute=gate.strategy == "arrow")
