"""A RAMoLE gate's training: its routers, and the loss of each step and of the held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_hub_sdk.composition.ramole import RouterLora
from lora_hub_sdk.engine._encoded import Encoded
from lora_hub_sdk.engine._gate_forward import FactorBank, GatedForward, Routers
from lora_hub_sdk.engine._gate_rows import GateRow, plan_step
from lora_hub_sdk.engine._training import Course, train

if TYPE_CHECKING:
    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.engine.base_model import BaseModel
    from lora_hub_sdk.engine.gate_training import GateTrainer


def learn(
    recipe: GateTrainer,
    base: BaseModel,
    adapters: Sequence[AdapterFactors],
    names: Sequence[str],
    rows: Sequence[GateRow],
    split: tuple[Sequence[int], Sequence[int]],
    near: Sequence[Sequence[int]],
    folder: Path,
    key: str,
) -> tuple[dict[str, RouterLora], Course]:
    """Train routers for every module that an adapter has; ``split`` are the rows to train on and to measure with.

    Raises:
        ConfigurationError: the folder holds the checkpoint of another training.
    """
    bank = FactorBank(adapters, base)
    forward = GatedForward(base, bank)
    encoded = Encoded(recipe, base, rows)
    routers = first_routers(bank, recipe.width, recipe.key_scale, recipe.seed)
    kept, held = split
    by_row = dict(enumerate(near))
    nearest = [near[row] for row in held]

    def measured(members: Sequence[Sequence[int]], chosen: Routers | None) -> float | None:
        if not held:
            return None
        found: list[float] = []
        with torch.no_grad():
            for start in range(0, len(held), recipe.batch):
                part = slice(start, start + recipe.batch)
                found += forward.losses(encoded.batch(held[part]), members[part], chosen).tolist()
        return sum(found) / len(found)

    def before() -> dict[str, float | None]:
        own = [[names.index(rows[row].adapter)] for row in held]
        return {"uniform_loss": measured(nearest, None), "own_loss": measured(own, None)}

    def loss(step: int) -> Tensor:
        placed = plan_step(
            rows,
            kept,
            by_row,
            names,
            step=step,
            batch=recipe.batch,
            k=recipe.k,
            drop=recipe.drop,
            others=recipe.others,
            seed=recipe.seed,
        )
        batch = encoded.batch([place.row for place in placed])
        return forward.losses(batch, [place.members for place in placed], routers).mean()

    weights = {f"{path} {side}": part for path, pair in routers.items() for side, part in zip("ab", pair, strict=True)}
    course = train(
        recipe,
        weights,
        before=before,
        loss=loss,
        measured=lambda: measured(nearest, routers),
        folder=folder,
        key=key,
    )
    return {path: RouterLora(a.detach().cpu(), b.detach().cpu()) for path, (a, b) in routers.items()}, course


def first_routers(bank: FactorBank, width: int, key_scale: float, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random a and b: queries of inputs of size 1 have size 1, and keys have ``key_scale`` times the outputs' size.

    An adapter changes a module's output by little, so scores begin near zero and weights near uniform. As neither
    factor is zero, both have gradients from the first step on.
    """
    draw = torch.Generator().manual_seed(seed)
    routers = {}
    for path, (a, b) in bank.modules.items():
        d_in, d_out = a.shape[1], b.shape[1]
        queries = torch.randn(width, d_in, generator=draw) / d_in**0.5
        keys = torch.randn(d_out, width, generator=draw) * (key_scale / d_out**0.5)
        routers[path] = (queries.to(a.device).requires_grad_(), keys.to(a.device).requires_grad_())
    return routers
