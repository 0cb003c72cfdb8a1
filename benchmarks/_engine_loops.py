"""Part "loops": our admission against transformers' two loops, on one stream of prompts of very different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

from benchmarks._report import Asked, Report, machine, throughput_ratio
from benchmarks._rounds import in_turns
from benchmarks._systems import EngineSystem, GenerateSystem, System
from benchmarks._workload import Model, Sizes, Tokens, Workload, build_workload
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.types import Adapter

_LOOPS: Final = ("generate", "generate_batch")


def measure_loops(model: Model, adapters: Sequence[Adapter], sizes: Sizes) -> Report:
    """The base model alone: prompts of a quarter to all of ``sizes.prompt_tokens``, twice ``sizes.batch`` of them."""
    sizes = replace(sizes, batch=2 * sizes.batch, shortest=max(sizes.prompt_tokens // 4, 1))
    workload = build_workload(adapters, sizes, model.vocabulary)
    plain = model.load()
    with closing(Engine(model.load())) as engine:
        systems: list[System] = [
            EngineSystem("engine", engine, workload, workload.base),
            GenerateSystem("generate", plain, plain.model, workload),
            _GenerateBatch("generate_batch", plain.model, workload),
        ]
        answers = {system.name: system.run(sizes.new_tokens) for system in systems}
        calls = {system.name: partial(system.run, sizes.new_tokens) for system in systems}
        seconds = in_turns(calls, sizes.rounds, warm_up=False)
    tokens = sizes.batch * sizes.new_tokens
    return Report(
        machine=machine(),
        settings={"part": "loops", "base_model": model.id, "dtype": model.dtype, **asdict(sizes)},
        systems={name: {"tokens_per_s": tokens / min(taken)} for name, taken in seconds.items()},
        ratios={f"engine / {loop}": Asked(1.0).of(throughput_ratio(seconds, "engine", loop)) for loop in _LOOPS},
        agree={
            f"engine == {loop}": {
                "rows_equal": sum(map(tuple.__eq__, answers["engine"], answers[loop])),
                "rows": sizes.batch,
            }
            for loop in _LOOPS
        },
    )


class _GenerateBatch:
    """transformers' continuous batching over a paged cache."""

    def __init__(self, name: str, model: Any, workload: Workload) -> None:
        self.name = name
        self._model = model
        self._prompts = [list(ids) for ids in workload.prompts]

    def run(self, new_tokens: int) -> Tokens:
        from transformers import GenerationConfig

        config: Any = GenerationConfig  # untyped
        found = self._model.generate_batch(
            inputs=self._prompts,
            generation_config=config(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0),
            progress_bar=False,
        )
        # Requests are named by their number at the end.
        ordered = sorted(found.items(), key=lambda named: int(named[0].rpartition("_")[2]))
        return [tuple(output.generated_tokens) for _, output in ordered]
