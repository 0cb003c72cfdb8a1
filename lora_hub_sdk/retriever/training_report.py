"""What a training leaves behind beside the weights: a report, and the model card that people read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lora_hub_sdk.retriever.left_out import LeftOut

#: Holds the report; a folder that has it is complete.
REPORT_FILE: Final = "training.json"


@dataclass(frozen=True, slots=True)
class Course:
    """How a training went.

    ``best_step`` is the one whose weights were kept; ``losses`` are means from one check to the next.
    """

    steps: int
    best_step: int
    seconds: float
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What was trained on what, and what came of it.

    ``before`` and ``after`` tell how the samples of the drawn tasks found their adapters among all tasks given,
    ``unseen_before`` and ``unseen_after`` those of the tasks that were not drawn; None where no sample could search.
    ``held_out`` tasks were drawn to stop early by.
    """

    folder: Path
    fingerprint: str
    encoder: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    unseen: tuple[str, ...]
    texts: int
    steps: int
    best_step: int
    seconds: float
    losses: tuple[float, ...]
    before: LeftOut | None
    after: LeftOut | None
    unseen_before: LeftOut | None
    unseen_after: LeftOut | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "folder": str(self.folder)}

    def write(self, digest: str) -> None:
        """Keep it in the folder, which is complete by that; ``digest`` is of what the training was asked for."""
        # Without its place, which is nobody's business once the folder is published.
        told = {name: value for name, value in self.as_dict().items() if name != "folder"}
        temporary = self.folder / f".{REPORT_FILE}"
        temporary.write_text(json.dumps({"digest": digest, "report": told}, indent=2) + "\n", "utf-8")
        os.replace(temporary, self.folder / REPORT_FILE)

    @classmethod
    def read(cls, folder: Path) -> TrainingReport:
        """The report in a trained folder, wherever the folder is now.

        Raises:
            OSError, ValueError, TypeError, KeyError: there is none that this version wrote.
        """
        found = json.loads((folder / REPORT_FILE).read_text("utf-8"))["report"]
        for name in ("trained", "held_out", "unseen", "losses"):
            found[name] = tuple(found[name])
        for name in ("before", "after", "unseen_before", "unseen_after"):
            found[name] = None if found[name] is None else LeftOut(**found[name])
        return cls(**{**found, "folder": folder})


def write_card(report: TrainingReport, recipe: dict[str, Any]) -> None:
    """Write README.md: what the encoder is, how it is used, what it was trained on, and how it did.

    Names of tasks are told, texts never: samples may be private.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "lora-retriever"],
        base_model=report.encoder if "/" in report.encoder and not Path(report.encoder).is_absolute() else None,
    )
    scores = [
        ("tasks trained on", report.before, report.after),
        ("tasks never seen", report.unseen_before, report.unseen_after),
    ]
    table = "\n".join(
        f"| {what} | {before.searches} | {100 * before.top_1:.1f} -> {100 * after.top_1:.1f} "
        f"| {100 * before.top_3:.1f} -> {100 * after.top_3:.1f} | {before.mrr:.3f} -> {after.mrr:.3f} |"
        for what, before, after in scores
        if before is not None and after is not None
    )
    held = f", and stopped early by {len(report.held_out)} more" if report.held_out else ""
    text = f"""---
{data.to_yaml()}
---
# A retriever of LoRA adapters

Finds the adapters that fit a prompt: each adapter is the mean vector of some prompts that it is good at, and a prompt's
vector is compared with these by cosine (LoraRetriever, arXiv 2402.09997). Fine-tuned from `{report.encoder}` by
lora_hub_sdk's `RetrieverTrainer` on {report.texts} texts of {len(report.trained)} tasks{held}.

Every text is embedded with the instruction `{recipe["instruction"]}` in front.

    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer("this folder or repository")
    vectors = model.encode(texts, prompt_name="task", normalize_embeddings=True)

    from lora_hub_sdk import LoraHub
    hub = LoraHub("hub.db")
    hub.switch_encoder("this folder or repository")

## How it does

Each sample searches for its own adapter, whose mean is then made of its other samples; before -> after training, %.

| | searches | first | among three | mean 1/rank |
|---|---|---|---|---|
{table}

## How it was trained

Fingerprint `{report.fingerprint}`, seed {recipe["seed"]}, {report.best_step} of {report.steps} steps in
{report.seconds:.0f} s.

| setting | value |
|---|---|
{_rows(recipe)}

Tasks trained on: {", ".join(report.trained)}.
"""
    ModelCard(text).save(report.folder / "README.md")


def _rows(recipe: dict[str, Any]) -> str:
    shown = ("steps", "epochs", "negatives", "hard", "temperature", "learning_rate", "max_tokens", "validation")
    return "\n".join(f"| {name} | {recipe[name]} |" for name in shown)
