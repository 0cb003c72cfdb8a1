"""What is written beside the weights: report, rows, model card, and the table of all adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_hub_sdk.demo.training._rows import HELD_OUT, Row, Split, Task
from lora_hub_sdk.demo.training.metrics import MetricName
from lora_hub_sdk.demo.training.recipes import BASE_MODEL_ID, Recipe
from lora_hub_sdk.demo.training.tasks import TASKS

_METRIC_WORDS: Mapping[MetricName, str] = {"em": "exact match %", "f1": "word-overlap F1 %"}

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
license: {licence_id}
{licence_name}language:
{languages}
tags:
- lora
- base_model:adapter:{base}
- lora-hub-sdk-demo
---
# {name}

{summary}

A small LoRA for {base}, made as a demo adapter of lora_hub_sdk. It is a short training: useful on
prompts like its own, not a general solution of the task.

| | base model | with this adapter |
|---|---|---|
| {metric}, {held_out} held-out rows, greedy | {before} | {after} |

The score wants the bare answer in the form that the adapter learned; the base model may say the right
thing in another form and gets nothing for it.

## Prompt and answer

One user turn in the chat template as shipped (with its default system prompt). From the training rows:

{examples}

## Data and licence

Source: {source}.

{train_rows} training rows; the {held_out} held-out rows (`heldout.jsonl`) share no example with them.
`samples.jsonl` holds 20 training rows for registering the adapter.

{licence}

## Training

{shape}.

{steps} steps of 8 rows, AdamW, peak learning rate {learning_rate} after 5 warm-up steps, then linear decay;
loss on the answer only; bfloat16 base, seed {seed}; {seconds:.0f} s on one CPU core. Final loss {loss:.3f}
(mean of the last ten steps). Weights are saved as bfloat16. `training.json` has every number.

To make it again, with the `demo-train` extra installed:

    python -m lora_hub_sdk.demo.training.train --task {name} --force
"""


@dataclass(frozen=True)
class Report:
    """Everything that one training run decided and measured; scores in percent."""

    task: str
    metric: MetricName
    before: float
    after: float
    recipe: Recipe
    seed: int
    train_rows: int
    seconds: float
    losses: tuple[float, ...]
    versions: Mapping[str, str]


def write_files(folder: Path, report: Report, split: Split, card: str) -> None:
    """Write report, rows and card into ``folder``; the card replaces the empty one that PEFT leaves there."""
    _write_lines(folder / "samples.jsonl", (asdict(row) for row in split.samples))
    extra = {"task": report.task, "metric": report.metric}
    _write_lines(folder / "heldout.jsonl", ({**asdict(row), **extra} for row in split.heldout))
    text = json.dumps({"base_model": BASE_MODEL_ID, **asdict(report)}, indent=1)
    (folder / "training.json").write_text(f"{_lists_on_one_line(text)}\n", "utf-8")
    (folder / "README.md").write_text(card, "utf-8")


def read_report(folder: Path) -> Report:
    """Read back the report that ``write_files`` left in an adapter folder."""
    kept = json.loads((folder / "training.json").read_text("utf-8"))
    del kept["base_model"]
    recipe = kept.pop("recipe")
    return Report(
        **{**kept, "losses": tuple(kept["losses"])},
        recipe=Recipe(**{**recipe, "modules": tuple(recipe["modules"])}),
    )


def model_card(task: Task, report: Report, samples: Sequence[Row]) -> str:
    """Return the Hub model card of one adapter; it shows the first two of ``samples``."""
    return _CARD.format(
        base=BASE_MODEL_ID,
        name=task.name,
        summary=task.summary,
        languages="\n".join(f"- {code}" for code in task.languages),
        licence_id=task.licence_id,
        # The Hub asks for a name where the licence is none of its own list.
        licence_name="license_name: see-data-and-licence\n" if task.licence_id == "other" else "",
        licence=task.licence,
        source=task.source,
        metric=_METRIC_WORDS[task.metric],
        held_out=HELD_OUT,
        before=report.before,
        after=report.after,
        examples="\n\n".join(_quote(f"{row.inputs}\n=> {row.targets}") for row in samples[:2]),
        train_rows=report.train_rows,
        shape=describe_shape(report.recipe),
        steps=report.recipe.steps,
        learning_rate=report.recipe.learning_rate,
        seed=report.seed,
        seconds=report.seconds,
        loss=sum(report.losses[-10:]) / len(report.losses[-10:]),
    )


def describe_shape(recipe: Recipe) -> str:
    """Return one line on a LoRA shape."""
    parts = [f"Rank {recipe.rank}, alpha {recipe.alpha}", ", ".join(recipe.modules)]
    if recipe.use_rslora:
        parts.append("rank-stabilised scaling (rsLoRA)")
    parts += [f"{module} rank {rank}" for module, rank in recipe.rank_pattern.items()]
    parts += [f"{module} alpha {alpha}" for module, alpha in recipe.alpha_pattern.items()]
    if recipe.last_layers is not None:
        parts.append(f"last {recipe.last_layers} layers only")
    return "; ".join(parts)


def result_table(output: Path, names: Sequence[str]) -> str:
    """Return the Markdown table of the adapters in ``output``; tasks without a folder are left out."""
    head = "| adapter | task | source | licence | metric | shape | size | steps / time | base | adapter |"
    rows = [_table_row(output / name, TASKS[name]) for name in names if (output / name).is_dir()]
    return "\n".join([head, "|---" * 10 + "|", *rows])


def _table_row(folder: Path, task: Task) -> str:
    report = read_report(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    cells = (
        f"`{task.name}`",
        task.summary.rstrip("."),
        task.source,
        task.licence_id,
        _METRIC_WORDS[task.metric],
        describe_shape(report.recipe),
        f"{size / 1e6:.2f} MB",
        f"{report.recipe.steps} / {report.seconds:.0f} s",
        f"{report.before:.1f}",
        f"{report.after:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _write_lines(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), "utf-8")


def _lists_on_one_line(text: str) -> str:
    """Join the lines of JSON lists, which hold numbers and short names only, so that losses take one line."""
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)


def _quote(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
