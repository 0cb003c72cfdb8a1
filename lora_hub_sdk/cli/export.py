"""``export``: what a prompt's adapters do together, or some by name, as one PEFT adapter for any server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from lora_hub_sdk.cli.answers import route_line
from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_hub, quiet_libraries
from lora_hub_sdk.cli.options import (
    AsJson,
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
    floor_of,
)
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Routing

if TYPE_CHECKING:
    from lora_hub_sdk.composition.export import Exported


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "export")(export)


def export(
    prompt: Annotated[
        str | None, typer.Argument(help="The text whose route is saved; none for named adapters.")
    ] = None,
    *,
    output: Annotated[str, typer.Option(help="A new or empty folder.", metavar="DIR")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Take this one without a search, by its share or equally; may be repeated.", metavar="NAME[=WEIGHT]"
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut to this rank; by default exact, the sum of all ranks.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights; by default float32.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Folder, Hub id or embedded name; by default that of the nearest adapter.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="selection, mixture or fusion.")] = "mixture",
    k: NearestCount = 3,
    weights: Annotated[str, typer.Option(help="uniform or similarity.")] = "uniform",
    min_score: Floor = None,
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
    """Save a prompt's adapters, or named ones, as one PEFT adapter that PEFT, vLLM or LoRAX can serve."""
    if (prompt is None) == (not adapter):
        raise ConfigurationError("give a prompt whose adapters are searched, or name some with --adapter")
    quiet_libraries()
    with open_hub(database, endpoint, index=index) as hub:
        if prompt is None:
            shares = _shares(adapter or ())
            exported = hub.export(shares, output, rank=rank, dtype=dtype, strategy=strategy, namespace=namespace)
            line = f"{strategy}: {', '.join(f'{name} x{share:.2f}' for name, share in shares.items())}"
            data = exported.as_dict()
        else:
            routing = Routing(
                strategy,
                k,
                weights,
                floor_of(min_score),
                namespace=namespace,
                tags=tuple(tag or ()),
                licenses=tuple(licence or ()),
                scores=tuple(scored or ()),
                min_trust=min_trust,
                rerank=rerank,
            )
            (route,) = hub.route([prompt], base_model=base_model, routing=routing)
            exported = hub.export(route, output, rank=rank, dtype=dtype)
            line = route_line(route)
            data = {**exported.as_dict(), "route": route.as_dict()}
    return Outcome(data, _view(exported, line))


def _shares(adapters: Sequence[str]) -> dict[str, float]:
    """Weights by name, equal ones where none is given.

    Raises:
        ConfigurationError: some have a weight and some have none, or one is named twice.
    """
    shares: dict[str, float | None] = {}
    for given in adapters:
        name, equals, share = given.rpartition("=")
        try:
            found = (name, float(share)) if equals else (given, None)
        except ValueError:  # a name that holds an equals sign
            found = (given, None)
        if found[0] in shares:
            raise ConfigurationError(f"--adapter {found[0]!r} is given twice")
        shares[found[0]] = found[1]
    known = {name: share for name, share in shares.items() if share is not None}
    if known and len(known) < len(shares):
        raise ConfigurationError(f"--adapter: give each a weight, or none; {', '.join(known)} have one, others do not")
    return known or dict.fromkeys(shares, 1.0 / len(shares))


def _view(exported: Exported, line: str) -> Text:
    cut = f", cut from {exported.exact_rank}" if exported.rank < exported.exact_rank else ""
    return Text(
        f"{exported.path}\n{line}\n"
        f"rank {exported.rank}{cut}, {len(exported.errors)} modules, {exported.size_bytes / 1e6:.1f} MB\n"
        f"relative error {exported.relative_error:.2g}, of the worst module {exported.largest_error:.2g}"
    )
