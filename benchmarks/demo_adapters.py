"""What each packaged adapter is worth: base model and adapter on its 50 held-out rows, through the SDK's own engine.

Exact match wants the bare answer, and a base model that was never taught the form gets nothing for a right answer in a
sentence. So a second score stands beside it: how often the expected answer occurs anywhere in what was said.

    python -m benchmarks.demo_adapters
    python -m benchmarks.demo_adapters --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from lora_hub_sdk import LoraHub, ModelSettings, Routing, Sampling
from lora_hub_sdk.demo import DemoAdapter, demo_adapters
from lora_hub_sdk.demo.training.metrics import mean_score

_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Gain:
    """Scores in percent on the held-out rows of one adapter's task; ``*_said`` count answers that hold the target."""

    adapter: str
    metric: str
    rows: int
    base: float
    tuned: float
    gain: float
    base_said: float
    tuned_said: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with TemporaryDirectory() as folder, LoraHub(f"{folder}/hub.db") as hub:
        gains = [
            _measure(hub, adapter, options.dtype, options.max_new_tokens)
            for adapter in demo_adapters()
            if not options.task or adapter.name in options.task
        ]
    if options.json:
        print(json.dumps({"settings": vars(options), "adapters": [asdict(gain) for gain in gains]}))
    else:
        _show(gains)


def _measure(hub: LoraHub, adapter: DemoAdapter, dtype: Any, max_new_tokens: int) -> Gain:
    hub.register(adapter.folder, samples=adapter.samples)
    prompts = [row.inputs for row in adapter.heldout]
    targets = [row.targets for row in adapter.heldout]

    def answers(routing: Routing) -> list[str]:
        completions = hub.generate(
            prompts,
            base_model=_MODEL,
            routing=routing,
            sampling=Sampling(max_new_tokens),
            settings=ModelSettings(dtype),
        )
        return [completion.text for completion in completions]

    base, tuned = answers(Routing("base")), answers(Routing("selection", adapters=(adapter.name,)))
    before, after = (mean_score(adapter.metric, said, targets) for said in (base, tuned))
    return Gain(
        adapter=adapter.name,
        metric=adapter.metric,
        rows=len(prompts),
        base=before,
        tuned=after,
        gain=after - before,
        base_said=_said(base, targets),
        tuned_said=_said(tuned, targets),
    )


def _said(answers: Sequence[str], targets: Sequence[str]) -> float:
    held = [target.strip().lower() in answer.lower() for answer, target in zip(answers, targets, strict=True)]
    return 100.0 * sum(held) / len(held)


def _show(gains: Sequence[Gain]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("adapter", "metric", "rows", "base", "adapter", "gain", "target said by base", "by adapter")
    for gain in gains:
        numbers = (gain.base, gain.tuned, gain.gain, gain.base_said, gain.tuned_said)
        table.add_row(gain.adapter, gain.metric, str(gain.rows), *(f"{number:.1f}" for number in numbers))
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_adapters", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", action="append", help="only this adapter; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    return parser


if __name__ == "__main__":
    main()
