"""What LangChain is told of an answer beside its text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_hub_sdk.types import Completion, Usage


def info_of(completion: Completion) -> dict[str, Any]:
    """How an answer came about, as ``generation_info`` and ``response_metadata`` have it."""
    trace = completion.trace
    return {
        "finish_reason": completion.finish_reason,
        "base_model": trace.base_model,
        "route": trace.route.as_dict(),
        "tiers": list(trace.tiers),
        "timing": None if trace.timing is None else trace.timing.as_dict(),
        "truncated_tokens": trace.truncated_tokens,
        "token_usage": completion.usage.as_dict(),
    }


def output_of(base_model: str | Path | None, completions: Sequence[Completion]) -> dict[str, Any]:
    """``llm_output``: of one call for several answers."""
    usages = [completion.usage for completion in completions]
    total = Usage(sum(usage.prompt_tokens for usage in usages), sum(usage.completion_tokens for usage in usages))
    return {"model_name": model_name(base_model, completions), "token_usage": total.as_dict()}


def model_name(base_model: str | Path | None, completions: Sequence[Completion]) -> str:
    """What the caller calls the base model; where none was asked for, the canonical names of those that answered."""
    if base_model is not None:
        return str(base_model)
    return ", ".join(sorted({completion.trace.base_model for completion in completions}))
