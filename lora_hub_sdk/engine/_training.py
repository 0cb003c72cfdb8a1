"""The loop of a gate's training: steps, measurements, and checkpoints from which it goes on bit by bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lora_hub_sdk.composition.tensor_file import read_tensors, tensor_bytes, write_whole
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.engine._recipe import Recipe

_CLIP: Final = 1.0
_WARMUP: Final = 0.1
#: Adam's two moments, by the names that torch keeps them under.
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


@dataclass
class Course:
    """How a training went so far.

    Attributes:
        losses: of each step.
        validation: (steps done, loss) on the held-out rows.
        before: what was measured before the first step, to compare with.
        seconds: of this run.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    before: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """As JSON can hold it, and as a gate keeps it."""
        validation = [list(entry) for entry in self.validation]
        return {"losses": list(self.losses), "validation": validation, **self.before}


def train(
    recipe: Recipe,
    weights: Mapping[str, Tensor],
    *,
    before: Callable[[], dict[str, float | None]],
    loss: Callable[[int], Tensor],
    measured: Callable[[], float | None],
    folder: Path,
    key: str,
) -> Course:
    """Change ``weights`` in place until all steps are done, going on where the folder's checkpoint is.

    Args:
        weights: what is trained, by name; float32.
        before: is asked once, before the first step.
        loss: of a step, by its number alone.
        measured: the loss on the held-out rows; None where there are none.
        key: of this training.

    Raises:
        ConfigurationError: the folder holds the checkpoint of another training.
    """
    from tqdm.auto import tqdm

    began = time.monotonic()
    trained = list(weights.values())
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    checkpoint = folder / "checkpoint.safetensors"
    course = _resumed(checkpoint, key, weights, optimizer) or Course(before=before())
    done = len(course.losses)
    with tqdm(total=recipe.steps, initial=done, desc="gate", unit="step", disable=not recipe.progress) as bar:
        for step in range(done, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, recipe.steps)
            found = loss(step)
            found.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            course.losses.append(found.item())
            bar.update()
            bar.set_postfix(loss=f"{course.losses[-1]:.3f}")
            if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.steps:
                if (held := measured()) is not None:
                    course.validation.append((step + 1, held))
                _keep(checkpoint, key, weights, optimizer, course)
    course.seconds = time.monotonic() - began
    return course


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    rise = max(1, round(_WARMUP * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def _keep(
    file: Path, key: str, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, course: Course
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{name} weight"] = weight
        for moment in _MOMENTS:
            tensors[f"{name} {moment}"] = optimizer.state[weight][moment]
    told = {"losses": course.losses, "validation": course.validation, "before": course.before}
    write_whole(file, tensor_bytes(tensors, {"key": key, "course": json.dumps(told)}))


def _resumed(file: Path, key: str, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Course | None:
    """Bring weights and optimizer to where the checkpoint was."""
    if not file.is_file():
        return None
    tensors, told = read_tensors(file.read_bytes())
    if told.get("key") != key:
        raise ConfigurationError(
            f"{str(file.parent)!r} holds another training that was not finished; finish it with the same arguments, "
            "choose another output, or remove the folder"
        )
    found = json.loads(told["course"])
    steps = float(len(found["losses"]))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"{name} weight"])
            moments = {moment: tensors[f"{name} {moment}"].to(weight.device) for moment in _MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(steps), **moments}
    return Course(found["losses"], [(step, loss) for step, loss in found["validation"]], found["before"])
