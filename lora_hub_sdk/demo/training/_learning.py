"""The part that owns tensors: encoding rows, training one LoRA, answering greedily."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_hub_sdk.demo.training._rows import Row
from lora_hub_sdk.demo.training.recipes import BASE_MODEL_ID, Recipe

if TYPE_CHECKING:
    from torch import Tensor

BATCH_SIZE = 8
_WARM_UP_STEPS = 5
_EVALUATION_BATCH = 25
_NO_LOSS = -100
_PROGRESS_STEPS = 20


@dataclass(frozen=True)
class Encoded:
    """One training row as token ids; only the last ``answer_length`` of them carry loss."""

    ids: tuple[int, ...]
    answer_length: int


@dataclass(frozen=True)
class TrainingLog:
    """What one training run measured; ``losses`` has one value per step."""

    losses: tuple[float, ...]
    seconds: float


class Learner:
    """A base model with its tokenizer, in bfloat16. Not thread-safe.

    Args:
        base: local folder of the base model.
        base_id: what adapters say they are for.
        device: as torch names it.
        prompt_tokens: prompts are cut to their last tokens for training, so that a step's time has a bound; answers are
            always to whole prompts, as they will be asked.
    """

    def __init__(
        self, base: Path, *, base_id: str = BASE_MODEL_ID, device: str = "cpu", prompt_tokens: int | None = None
    ) -> None:
        from transformers import AutoTokenizer

        self._base = base
        self._base_id = base_id
        self._device = device
        self._prompt_tokens = prompt_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self._tokenizer.padding_side = "left"
        self._end: int = self._tokenizer.eos_token_id

    def train(self, recipe: Recipe, rows: Sequence[Row], *, seed: int, folder: Path) -> TrainingLog:
        """Train one LoRA on ``rows`` and save it into ``folder`` as PEFT does, with bfloat16 weights."""
        import torch
        from peft import get_peft_model

        torch.manual_seed(seed)
        model: Any = get_peft_model(self._load_base(), recipe.lora_config())
        model.train()
        encoded = [self._encode(row) for row in rows]
        # The adapter learns in float32, as PEFT sets it up: bfloat16 would round small updates away.
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
        losses: list[float] = []
        start = time.perf_counter()
        for step, batch in enumerate(_batches(encoded, recipe.steps, seed)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate_factor(step, recipe.steps)
            loss = model(**self._collate(batch)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 4))
            if len(losses) % _PROGRESS_STEPS == 0:
                passed = time.perf_counter() - start
                print(f"  step {len(losses)}/{recipe.steps}, loss {losses[-1]}, {passed:.0f} s", flush=True)
        seconds = time.perf_counter() - start
        _save(model, folder, self._base_id)
        return TrainingLog(tuple(losses), seconds)

    def answer(self, rows: Sequence[Row], *, max_new_tokens: int, adapter: Path | None = None) -> list[str]:
        """Return greedy answers of the base model, or of the adapter saved in ``adapter``, in row order."""
        model = self._load_base()
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        model.eval()
        return [
            text
            for start in range(0, len(rows), _EVALUATION_BATCH)
            for text in self._generate(model, rows[start : start + _EVALUATION_BATCH], max_new_tokens)
        ]

    def _load_base(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.bfloat16)
        return model.to(self._device)

    def _prompt(self, row: Row) -> str:
        if self._tokenizer.chat_template is None:
            return row.inputs
        turns = [{"role": "user", "content": row.inputs}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def _encode(self, row: Row) -> Encoded:
        prompt = self._tokenizer(self._prompt(row), add_special_tokens=False).input_ids
        if self._prompt_tokens is not None:
            prompt = prompt[-self._prompt_tokens :]
        answer = [*self._tokenizer(row.targets, add_special_tokens=False).input_ids, self._end]
        return Encoded((*prompt, *answer), len(answer))

    def _collate(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad on the right to the longest row; return ids, mask and labels, each of shape (rows, longest)."""
        import torch

        width = max(len(row.ids) for row in batch)
        ids = torch.full((len(batch), width), self._end)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, _NO_LOSS)
        for i, row in enumerate(batch):
            length = len(row.ids)
            ids[i, :length] = torch.tensor(row.ids)
            mask[i, :length] = 1
            labels[i, length - row.answer_length : length] = ids[i, length - row.answer_length : length]
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self._device) for name, tensor in found.items()}

    def _generate(self, model: Any, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
        import torch

        prompts = [self._prompt(row) for row in rows]
        batch = self._tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=self._end)
        new = output[:, batch.input_ids.shape[1] :]
        return [str(text) for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]


def _batches(rows: Sequence[Encoded], steps: int, seed: int) -> Iterator[list[Encoded]]:
    """Yield ``steps`` batches: each pass over the rows is shuffled anew, without an incomplete batch."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH_SIZE:
            order = rng.sample(range(len(rows)), len(rows))
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        yield [rows[i] for i in batch]


def _rate_factor(step: int, steps: int) -> float:
    """Return the learning rate as a share of its peak: a short linear warm-up, then linear decay."""
    return min((step + 1) / _WARM_UP_STEPS, (steps - step) / max(1, steps - _WARM_UP_STEPS))


def _save(model: Any, folder: Path, base_id: str) -> None:
    import torch

    # A local path in the card's metadata would be useless to anyone else.
    model.peft_config["default"].base_model_name_or_path = base_id
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(folder)
