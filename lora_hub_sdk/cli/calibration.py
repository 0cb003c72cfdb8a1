"""``calibrate`` and ``fit-weights``: from which score on an adapter fits a prompt, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import Actor, AsJson, Database, Endpoint, Index, Namespace, Rerank
from lora_hub_sdk.types import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from lora_hub_sdk.composition.weight_fitting import WeightFit
    from lora_hub_sdk.retriever.accuracy import Share
    from lora_hub_sdk.retriever.calibration import Calibration


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "calibrate")(calibrate)
    command(app, "fit-weights")(fit_weights)


def calibrate(
    *,
    false_abstain: Annotated[
        float, typer.Option(help="Share of fitting prompts that may be left to the base model.")
    ] = 0.05,
    trained: Annotated[
        list[str] | None, typer.Option(help="An adapter that the encoder was trained on; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws in a large registry.")] = 0,
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    actor: Actor = None,
    as_json: AsJson = False,
) -> Outcome:
    """Find from which score on an adapter fits a prompt, and keep it for --min-score auto."""
    quiet_libraries()
    with open_hub(database, endpoint, index=index, actor=actor) as hub:
        found = hub.calibrate(false_abstain=false_abstain, namespace=namespace, trained=trained or (), seed=seed)
    return Outcome(found.as_dict(), Group(*_views(found)))


def fit_weights(
    *,
    k: Annotated[int, typer.Option("--k", "-k", help="How many adapters a route will have.")] = 3,
    questions: Annotated[
        str | None,
        typer.Option(
            help='JSON lines of {"inputs", "task"}: prompts and their adapters, to learn from too.', metavar="FILE"
        ),
    ] = None,
    trained: Annotated[
        list[str] | None, typer.Option(help="An adapter that the encoder was trained on; may be repeated.")
    ] = None,
    rerank: Rerank = None,
    seed: Annotated[int, typer.Option(help="Of the folds, the intervals, and the draws in a large registry.")] = 0,
    database: Database,
    index: Index,
    endpoint: Endpoint = None,
    namespace: Namespace = DEFAULT_NAMESPACE,
    actor: Actor = None,
    as_json: AsJson = False,
) -> Outcome:
    """Learn how much each adapter of a route counts, and keep it for --weights fitted, sparse and gate."""
    from lora_hub_sdk.retriever.questions import read_questions

    asked = [] if questions is None else read_questions(questions)
    quiet_libraries()
    with open_hub(database, endpoint, index=index, actor=actor) as hub:
        found = hub.fit_weights(
            k=k, questions=asked, namespace=namespace, trained=trained or (), rerank=rerank, seed=seed
        )
    return Outcome(found.as_dict(), Group(*_weight_views(found)))


def _weight_views(found: WeightFit) -> Sequence[Table | Text]:
    counted = (
        f"{found.rows} searches of {found.adapters} adapters; {found.found:.1%} had a right one in the first {found.k}"
    )
    if found.skipped:
        counted += f"; {found.skipped} adapters without kept samples were left out"
    table = Table(
        "weights", caption="in brackets 95 % of other draws of adapters; learned ones on adapters unseen in the fit"
    )
    for column in ("log-likelihood", "right one first", "weight of the right", "adapters used"):
        table.add_column(column, justify="right")
    for name, scores in found.scores.items():
        shares = (scores.log_likelihood, scores.top, scores.owner, scores.used)
        table.add_row(name, *map(_interval, shares))
    return [Text(counted), table, *(Text(f"note: {warning}") for warning in found.warnings)]


def _interval(share: Share) -> str:
    return f"{share.value:.2f} ({share.low:.2f} to {share.high:.2f})"


def _views(found: Calibration) -> Sequence[Table | Text]:
    counted = f"{found.samples} samples of {found.adapters} adapters"
    if found.skipped:
        counted += f"; {found.skipped} adapters without kept samples were left out"
    table = Table()
    table.add_column("an adapter fits from")
    table.add_column("left to the base model", justify="right")
    table.add_column("let through, adapter away", justify="right")
    table.add_column("let through, domain away", justify="right")
    rule = found.rule
    bounds = (
        (f"words + {rule.weight:g} x cosine >= {rule.min_fit:.4f} (auto)", found.by_rule),
        (f"cosine >= {found.min_score:.4f}", found.by_cosine),
    )
    for bound, rates in bounds:
        shares = (rates.false_abstain, rates.false_route, rates.false_route_domain)
        table.add_row(bound, *("-" if share is None else f"{share:.1%}" for share in shares))
    return [Text(counted), table, *(Text(f"note: {warning}") for warning in found.warnings)]
