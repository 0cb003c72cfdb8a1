"""``search`` and ``generate``: which adapters fit a prompt, and what comes out with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.adapters import adapter_data
from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import (
    AnsweringBase,
    AsJson,
    BaseModelFilter,
    Database,
    Endpoint,
    Floor,
    Index,
    LicenseFilter,
    Namespace,
    NearestCount,
    Rerank,
    ScoreFilter,
    TagFilter,
    TrustFilter,
    base_of,
    floor_of,
)
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import DEFAULT_NAMESPACE, GATED, Completion, Hit, Route, Routing, Sampling


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "search")(search)
    command(app, "generate")(generate)


def search(
    prompt: Annotated[str, typer.Argument(help="The text to find adapters for.")],
    *,
    k: NearestCount = 3,
    base_model: BaseModelFilter = None,
    tag: TagFilter = None,
    licence: LicenseFilter = None,
    scored: ScoreFilter = None,
    min_trust: TrustFilter = "low",
    rerank: Rerank = None,
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Find the adapters nearest to a prompt."""
    quiet_libraries()
    with open_hub(database, endpoint, index=index) as hub:
        hits = hub.search(
            prompt,
            k,
            base_model=base_model,
            namespace=namespace,
            tags=tag or (),
            licenses=licence or (),
            scores=scored or (),
            min_trust=min_trust,
            rerank=rerank,
        )
    data = [
        {"score": hit.score, "relevance": hit.relevance, "trust": hit.trust, "adapter": adapter_data(hit.adapter)}
        for hit in hits
    ]
    return Outcome(data, _hits_table(hits) if hits else Text("no adapters"))


def generate(
    prompts: Annotated[list[str], typer.Argument(help="Prompts, answered in one batch; - reads stdin, one per line.")],
    *,
    base_model: AnsweringBase = "smollm2-135m-instruct",
    strategy: Annotated[
        str,
        typer.Option(
            help="selection, mixture, fusion, base; with --gate also ramole, moe-soft, moe-top3, moe-top1, smear, arrow"
        ),
    ] = "mixture",
    k: NearestCount = 3,
    weights: Annotated[str, typer.Option(help="uniform, similarity, fitted, sparse or gate.")] = "uniform",
    gate: Annotated[
        str | None, typer.Option(help="For a --strategy that a gate weighs, as train-gate's ramole.", metavar="FILE")
    ] = None,
    min_score: Floor = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Use this one without a search; may be repeated.")] = None,
    tag: TagFilter = None,
    licence: LicenseFilter = None,
    scored: ScoreFilter = None,
    min_trust: TrustFilter = "low",
    rerank: Rerank = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    template: Annotated[
        Literal["auto", "chat", "alpaca", "adapter", "none"], typer.Option(help="How a prompt is framed for the model.")
    ] = "auto",
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format of the base model.")
    ] = "auto",
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    as_json: AsJson = False,
) -> Outcome:
    """Answer prompts, each with the adapters that fit it."""
    texts, base = _with_stdin(prompts), base_of(base_model)
    quiet_libraries()
    from lora_hub_sdk.composition.strategies import STRATEGIES
    from lora_hub_sdk.engine.base_model import ModelSettings

    gated = [name for name, known in STRATEGIES.items() if known.averaged in GATED]
    if (gate is None) == (strategy in gated):
        raise typer.BadParameter(
            f"--gate FILE and --strategy {', '.join(gated)} go together; lora-hub train-gate makes a file for ramole"
        )
    with open_hub(database, endpoint, index=index) as hub:
        if gate is not None:
            hub.use_gate(gate, base_model=base)
        completions = hub.generate(
            texts,
            base_model=base,
            routing=Routing(
                strategy,
                k,
                weights,
                floor_of(min_score),
                adapters=tuple(adapter) if adapter else None,
                namespace=namespace,
                tags=tuple(tag or ()),
                licenses=tuple(licence or ()),
                scores=tuple(scored or ()),
                min_trust=min_trust,
                rerank=rerank,
            ),
            sampling=Sampling(max_new_tokens, temperature, seed=seed, stop=tuple(stop or ())),
            template=None if template == "none" else template,
            settings=ModelSettings(dtype),
            timeout_s=timeout,
        )
    pairs = list(zip(texts, completions, strict=True))
    data = [_completion_data(text, completion) for text, completion in pairs]
    views = [
        _answer(text, completion, alone=len(pairs) == 1, base=completion.trace.base_model if base is None else None)
        for text, completion in pairs
    ]
    return Outcome(data, Group(*views))


def route_line(route: Route) -> str:
    """One line that tells how a prompt was answered."""
    if not route.members:
        return f"{route.strategy}: the base model alone"
    members = (
        f"{member.adapter.name} x{member.weight:.2f}" + ("" if member.score is None else f" (score {member.score:.2f})")
        for member in route.members
    )
    return f"{route.strategy}: {', '.join(members)}"


def _with_stdin(prompts: Sequence[str]) -> list[str]:
    """The prompts, ``-`` replaced by the lines of standard input that are not blank.

    Raises:
        ConfigurationError: that leaves none.
    """
    texts: list[str] = []
    for prompt in prompts:
        texts += [line for line in sys.stdin.read().splitlines() if line.strip()] if prompt == "-" else [prompt]
    if not texts:
        raise ConfigurationError("standard input holds no prompts; give one per line")
    return texts


def _completion_data(prompt: str, completion: Completion) -> dict[str, Any]:
    trace = completion.trace
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": completion.usage.as_dict(),
        "base_model": trace.base_model,
        "route": trace.route.as_dict(),
        "tiers": list(trace.tiers),
        "timing": None if trace.timing is None else trace.timing.as_dict(),
        "batch_size": trace.batch_size,
        "truncated_tokens": trace.truncated_tokens,
    }


def _answer(prompt: str, completion: Completion, *, alone: bool, base: str | None) -> Text:
    lines = Text()
    if not alone:
        lines.append(f"> {prompt}\n", style="bold")
    lines.append(completion.text.strip())
    by = "" if base is None else f", by {base}"
    lines.append(f"\n[{route_line(completion.trace.route)}{by}]", style="dim")
    return lines


def _hits_table(hits: Sequence[Hit]) -> Table:
    table = Table()
    reranked = any(hit.relevance is not None for hit in hits)
    table.add_column("score", justify="right")
    if reranked:
        table.add_column("relevance", justify="right")
    table.add_column("trust")
    table.add_column("name", overflow="fold")
    table.add_column("base model")
    table.add_column("description")
    for hit in hits:
        adapter = hit.adapter
        table.add_row(
            f"{hit.score:.3f}",
            *(["-" if hit.relevance is None else f"{hit.relevance:.2f}"] if reranked else []),
            hit.trust,
            Text(adapter.name),
            Text(adapter.base_model),
            Text(adapter.description or "-"),
        )
    return table
