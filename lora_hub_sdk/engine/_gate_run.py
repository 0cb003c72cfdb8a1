"""The loop of a gate's training: steps, measurements, and checkpoints from which it goes on bit by bit."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lora_hub_sdk.composition.ramole import RouterLora, read_tensors, tensor_bytes, write_whole
from lora_hub_sdk.engine._gate_forward import FactorBank, GateBatch, GatedForward, Routers
from lora_hub_sdk.engine._gate_rows import GateRow, plan_step
from lora_hub_sdk.engine.prompt import PromptEncoder
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.engine.base_model import BaseModel
    from lora_hub_sdk.engine.gate_training import GateTrainer

_CLIP: Final = 1.0
_WARMUP: Final = 0.1
#: Adam's two moments, by the names that torch keeps them under.
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


@dataclass
class Learned:
    """What a training made and how it went so far."""

    routers: dict[str, RouterLora] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    uniform_loss: float | None = None
    own_loss: float | None = None
    seconds: float = 0.0


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
) -> Learned:
    """Train routers for every module that an adapter has; ``split`` are the rows to train on and to measure with.

    Raises:
        ConfigurationError: the folder holds the checkpoint of another training.
    """
    from tqdm.auto import tqdm

    began = time.monotonic()
    bank = FactorBank(adapters, base)
    forward = GatedForward(base, bank)
    encoded = Encoded(recipe, base, rows)
    routers = first_routers(bank, recipe.width, recipe.key_scale, recipe.seed)
    weights = [weight for pair in routers.values() for weight in pair]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    checkpoint = folder / "checkpoint.safetensors"
    learned = _resumed(checkpoint, key, routers, optimizer)
    kept, held = split
    by_row = dict(enumerate(near))

    def measured(members: Sequence[Sequence[int]], chosen: Routers | None) -> float | None:
        if not held:
            return None
        found: list[float] = []
        with torch.no_grad():
            for start in range(0, len(held), recipe.batch):
                part = slice(start, start + recipe.batch)
                found += forward.losses(encoded.batch(held[part]), members[part], chosen).tolist()
        return sum(found) / len(found)

    if learned.uniform_loss is None:
        learned.uniform_loss = measured([near[row] for row in held], None)
        learned.own_loss = measured([[names.index(rows[row].adapter)] for row in held], None)
    done = len(learned.losses)
    with tqdm(total=recipe.steps, initial=done, desc="gate", unit="step", disable=not recipe.progress) as bar:
        for step in range(done, recipe.steps):
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
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, recipe.steps)
            batch = encoded.batch([place.row for place in placed])
            loss = forward.losses(batch, [place.members for place in placed], routers).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            learned.losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{learned.losses[-1]:.3f}")
            if (step + 1) % recipe.check_every == 0 or step + 1 == recipe.steps:
                if (found := measured([near[row] for row in held], routers)) is not None:
                    learned.validation.append((step + 1, found))
                _keep(checkpoint, key, routers, optimizer, learned)
    learned.routers = {path: RouterLora(a.detach().cpu(), b.detach().cpu()) for path, (a, b) in routers.items()}
    learned.seconds = time.monotonic() - began
    return learned


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


class Encoded:
    """The rows' tokens, made when a row is first dealt."""

    def __init__(self, recipe: GateTrainer, base: BaseModel, rows: Sequence[GateRow]) -> None:
        self._base, self._rows = base, rows
        self._prompts = PromptEncoder(base.tokenizer, recipe.template)
        self._room = min(recipe.max_tokens, base.context - recipe.answer_tokens - 1)
        self._most = recipe.answer_tokens
        if self._room < 1:
            raise ConfigurationError(f"answer_tokens={self._most} leaves no room in a context of {base.context} tokens")
        end = base.tokenizer.eos_token_id
        self._end = [end] if end in base.eos_ids else sorted(base.eos_ids)[:1]
        self._tokens: dict[int, tuple[Sequence[int], Sequence[int]]] = {}

    def batch(self, numbers: Sequence[int]) -> GateBatch:
        for number in numbers:
            if number not in self._tokens:
                self._tokens[number] = self._encode(self._rows[number], number)
        return GateBatch.of([self._tokens[number] for number in numbers], self._base.pad_id, self._base.device)

    def _encode(self, row: GateRow, number: int) -> tuple[Sequence[int], Sequence[int]]:
        tokenizer: Any = self._base.tokenizer
        prompt = self._prompts.encode(row.inputs, limit=self._room, row=number).ids
        answer = list(tokenizer(row.targets, add_special_tokens=False)["input_ids"])
        # An adapter whose answer is empty ends at once, which is an answer too.
        whole = answer + self._end if row.finished or not answer else answer
        return prompt, whole[: self._most]


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest."""
    rise = max(1, round(_WARMUP * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def _keep(file: Path, key: str, routers: Routers, optimizer: torch.optim.Optimizer, learned: Learned) -> None:
    tensors: dict[str, Tensor] = {}
    for path, pair in routers.items():
        for side, weight in zip("ab", pair, strict=True):
            tensors[f"{path} {side} weight"] = weight
            for name in _MOMENTS:
                tensors[f"{path} {side} {name}"] = optimizer.state[weight][name]
    told = {
        "losses": learned.losses,
        "validation": learned.validation,
        "uniform_loss": learned.uniform_loss,
        "own_loss": learned.own_loss,
    }
    write_whole(file, tensor_bytes(tensors, {"key": key, "learned": json.dumps(told)}))


def _resumed(file: Path, key: str, routers: Routers, optimizer: torch.optim.Optimizer) -> Learned:
    """Bring routers and optimizer to where the checkpoint was."""
    if not file.is_file():
        return Learned()
    tensors, told = read_tensors(file.read_bytes())
    if told.get("key") != key:
        raise ConfigurationError(
            f"{str(file.parent)!r} holds another training that was not finished; finish it with the same arguments, "
            "choose another output, or remove the folder"
        )
    found = json.loads(told["learned"])
    steps = float(len(found["losses"]))
    with torch.no_grad():
        for path, pair in routers.items():
            for side, weight in zip("ab", pair, strict=True):
                weight.copy_(tensors[f"{path} {side} weight"])
                moments = {name: tensors[f"{path} {side} {name}"].to(weight.device) for name in _MOMENTS}
                optimizer.state[weight] = {"step": torch.tensor(steps), **moments}
    return Learned(
        losses=found["losses"],
        validation=[(step, loss) for step, loss in found["validation"]],
        uniform_loss=found["uniform_loss"],
        own_loss=found["own_loss"],
    )
