"""The part of training that needs torch: sentence-transformers' trainer over planned steps, with checkpoints."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.evaluation import SentenceEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from lora_hub_sdk.models.loading import LOADING
from lora_hub_sdk.retriever.left_out import leave_one_out
from lora_hub_sdk.retriever.training_report import Course

if TYPE_CHECKING:
    from lora_hub_sdk.retriever.pairs import Pair
    from lora_hub_sdk.retriever.tasks import Task
    from lora_hub_sdk.retriever.trainer import RetrieverTrainer

#: Name of the instruction among the prompts of the saved model.
PROMPT_NAME: Final = "task"
_METRIC: Final = "eval_mrr"
#: Every text of a step is held against every text of the other tasks: three times the negatives of anchors against
#: positives alone, at no more encoding. On the paper's unseen tasks 4 points of top 1.
_DIRECTIONS: Final = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def run(
    recipe: RetrieverTrainer,
    start: Path,
    planned: Sequence[Sequence[Pair]],
    trained: Sequence[Task],
    held_out: Sequence[Task],
    checkpoints: Path,
) -> tuple[Any, Course]:
    """The trained model, and how it came about: from the last checkpoint on, where there is one.

    The caller's random states stay as they are.
    """
    began = time.monotonic()
    with LOADING:
        model = SentenceTransformer(str(start), device=recipe.device, local_files_only=True)
    most = model.max_seq_length
    model.max_seq_length = min(recipe.max_tokens, most or recipe.max_tokens)
    size = len(planned[0])
    pairs = [pair for step in planned for pair in step]
    disable_progress_bar()
    dataset = Dataset.from_dict(
        {"anchor": [pair.anchor for pair in pairs], "positive": [pair.positive for pair in pairs]}
    )
    args = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        max_steps=len(planned),
        per_device_train_batch_size=size,
        learning_rate=recipe.learning_rate,
        warmup_steps=max(1, round(0.1 * len(planned))),
        weight_decay=0.01,
        seed=recipe.seed,
        prompts=recipe.instruction or None,
        save_strategy="steps",
        save_steps=recipe.check_every,
        save_total_limit=2,
        eval_strategy="steps" if held_out else "no",
        eval_steps=recipe.check_every,
        load_best_model_at_end=bool(held_out),
        metric_for_best_model=_METRIC if held_out else None,
        greater_is_better=True if held_out else None,
        logging_steps=recipe.check_every,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=model.device.type == "cpu",
        bf16=_is_bfloat16(recipe.precision, model.device.type),
        fp16=recipe.precision == "float16",
    )
    with _random_states_kept():
        trainer = _Trainer(
            model=model,
            args=args,
            train_dataset=dataset,
            loss=MultipleNegativesRankingLoss(model, scale=1 / recipe.temperature, directions=_DIRECTIONS),
            evaluator=_HeldOut(recipe, trained, held_out) if held_out else None,
            callbacks=[EarlyStoppingCallback(recipe.patience)] if held_out else None,
        )
        # It would write to stdout, where a command's result belongs.
        trainer.remove_callback(PrinterCallback)
        if recipe.progress:
            trainer.add_callback(_Bar())
        trainer.train(resume_from_checkpoint=_last(checkpoints))
    model.max_seq_length = most
    model.prompts = {PROMPT_NAME: recipe.instruction}
    best = trainer.state.best_model_checkpoint
    return model, Course(
        steps=trainer.state.global_step,
        best_step=int(best.rpartition("-")[2]) if best else trainer.state.global_step,
        seconds=time.monotonic() - began,
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
    )


class _Trainer(SentenceTransformerTrainer):
    """Deals the planned steps as they were planned; with several GPUs too, which share a step."""

    def get_batch_sampler(self, dataset: Dataset, *_: Any, **options: Any) -> BatchSampler:
        size = self.args.per_device_train_batch_size
        return DefaultBatchSampler(SequentialSampler(dataset), **{**options, "batch_size": size})

    def add_model_card_callback(self, _: Any) -> None:
        """None: its card quotes texts, which may be private."""


class _HeldOut(SentenceEvaluator):
    """How the samples of adapters that are not trained on find them, among all."""

    def __init__(self, recipe: RetrieverTrainer, trained: Sequence[Task], held_out: Sequence[Task]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._instruction = recipe.instruction
        self._tasks = {task.name: task.inputs for task in (*trained, *held_out)}
        self._searching = [task.name for task in held_out]

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        vectors = {
            name: model.encode(
                [self._instruction + text for text in texts], normalize_embeddings=True, show_progress_bar=False
            )
            for name, texts in self._tasks.items()
        }
        found = leave_one_out(vectors, self._searching)
        assert found is not None  # those without a second text are not held out
        return {"mrr": found.mrr, "top_1": found.top_1}


class _Bar(TrainerCallback):
    """A bar on standard error; transformers' own would print the metrics to stdout."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        shown = {name: value for name, value in (logs or {}).items() if name in ("loss", _METRIC)}
        self._bar.set_postfix({**shown})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


def _last(checkpoints: Path) -> str | None:
    """The last checkpoint that was written to its end; its state is written last."""
    found = [file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda folder: int(folder.name.rpartition("-")[2]))) if found else None


def _is_bfloat16(asked: str, device: str) -> bool:
    return asked == "bfloat16" or (asked == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The trainer seeds every global generator; a library's caller wants their own back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
