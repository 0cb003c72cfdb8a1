"""``discover`` and ``inspect``: what a Hub has, and whether it would be admitted; nothing is registered."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.command import Outcome, command
from lora_hub_sdk.cli.opening import open_to_look, quiet_libraries
from lora_hub_sdk.cli.options import AsJson, Database, Endpoint, Offline, OwnBase, Revision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_hub_sdk.registry.discovery import Candidate
    from lora_hub_sdk.registry.inspection import Inspection

_VERDICTS: Final = {True: ("passed", "green"), False: ("refused", "red"), None: ("not reached", "dim")}


def add_to(app: typer.Typer) -> None:
    """Add this module's commands."""
    command(app, "discover")(discover)
    command(app, "inspect")(inspect)


def discover(
    base_model: Annotated[str, typer.Argument(help="Hub id or embedded name of the base model.")],
    *,
    query: Annotated[str | None, typer.Option(help="Text that the repository's id contains.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many adapters to look for.")] = 20,
    refused: Annotated[bool, typer.Option("--refused", help="Also those that would be refused, and why.")] = False,
    database: Database,
    endpoint: Endpoint = None,
    as_json: AsJson = False,
) -> Outcome:
    """Look for a base model's adapters on the Hub, each judged by its own configuration."""
    with open_to_look(database, endpoint) as hub:
        found = hub.discover(base_model, query, limit=limit, include_refused=refused)
    view = _candidates(found, refused) if found else Text("no adapters")
    return Outcome([asdict(candidate) for candidate in found], view)


def inspect(
    reference: Annotated[str, typer.Argument(help="A Hub id (user/lora-x) or a local folder.")],
    *,
    revision: Revision = None,
    base_model: OwnBase = None,
    database: Database,
    endpoint: Endpoint = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> Outcome:
    """Check an adapter as register would, and report; exit code 1 where it would be refused."""
    quiet_libraries()
    with open_to_look(database, endpoint, offline=offline) as hub:
        report = hub.inspect(reference, revision=revision, base_model=base_model)
    return Outcome(asdict(report), _report(reference, report), exit_code=0 if report.accepted else 1)


def _candidates(found: Sequence[Candidate], refused: bool) -> Table:
    table = Table(title=f"{len(found)} adapters", title_justify="left")
    table.add_column("repository", overflow="fold")
    for column in ("revision", "rank", "alpha", "downloads", "likes", "licence"):
        table.add_column(column, justify="right" if column in {"rank", "alpha", "downloads", "likes"} else "left")
    if refused:
        table.add_column("problem", overflow="fold")
    for candidate in found:
        cells = [
            candidate.repo_id,
            candidate.revision[:12],
            _shown(candidate.rank),
            _shown(candidate.alpha),
            str(candidate.downloads),
            str(candidate.likes),
            candidate.license or "-",
            *([candidate.problem or "-"] if refused else []),
        ]
        table.add_row(*map(Text, cells))
    return table


def _report(reference: str, report: Inspection) -> Group:
    verdict = f"{reference} would be registered" if report.accepted else f"{report.error}: {report.message}"
    checks, facts = Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
    for check in report.checks:
        said, style = _VERDICTS[check.passed]
        checks.add_row(Text(check.name, style="bold"), Text(said, style=style), Text(check.detail))
    for field, value in asdict(report).items():
        if field not in {"accepted", "error", "message", "checks"}:
            facts.add_row(Text(field, style="bold"), Text(_shown(value)))
    return Group(Text(verdict, style="green" if report.accepted else "red"), Text(), checks, Text(), facts)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
