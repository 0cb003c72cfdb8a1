"""The arguments and options that several commands share, each declared once."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import typer

from lora_hub_sdk.config import default_database, default_index
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import MinScore, Trust


def floor_of(given: str | None) -> float | Literal["auto"] | None:
    """What ``Floor`` holds; typer itself knows no unions.

    Raises:
        ConfigurationError: neither a number nor auto.
    """
    if given is None:
        return None
    if given == "auto":
        return "auto"
    try:
        return float(given)
    except ValueError:
        raise ConfigurationError(f"--min-score {given!r}: expected a number from -1 to 1, or auto") from None


def base_of(given: str) -> str | None:
    """What ``AnsweringBase`` holds."""
    return None if given == NEAREST else given


def _min_score(given: str | MinScore) -> MinScore:
    """From ``TASK/METRIC=VALUE``; the last slash parts the two, as names of tasks may hold some."""
    if isinstance(given, MinScore):
        return given
    name, equals, value = given.rpartition("=")
    task, slash, metric = name.rpartition("/")
    try:
        number = float(value)
    except ValueError:
        number = None
    if not (equals and slash and task and metric) or number is None:
        raise typer.BadParameter(f"{given!r}: expected TASK/METRIC=VALUE, like sst2/accuracy=0.9")
    return MinScore(task, metric, number)


#: Instead of a base model's name.
NEAREST: Final = "nearest"

AnsweringBase = Annotated[
    str,
    typer.Option(
        "--base-model",
        help=f"Folder, Hub id or embedded name; {NEAREST}: for each prompt the base of its nearest adapter.",
    ),
]
AdapterName = Annotated[str, typer.Argument(help="Name of a registered adapter.")]
Database = Annotated[
    str,
    typer.Option(
        "--database",
        default_factory=default_database,
        show_default="LORA_HUB_DATABASE, else hub.db",
        help="SQLite file or SQLAlchemy URL of the registry.",
    ),
]
Index = Annotated[
    str | None,
    typer.Option(
        "--index",
        default_factory=default_index,
        show_default="LORA_HUB_INDEX, else beside the database",
        help="Folder of the vector index, URL of a Chroma server, or exact for one in memory.",
    ),
]
Endpoint = Annotated[
    str | None, typer.Option("--endpoint", help="A Hub other than https://huggingface.co.", metavar="URL")
]
Offline = Annotated[bool, typer.Option("--offline", help="Ask no Hub; take what was pulled before.")]
Actor = Annotated[
    str | None, typer.Option("--actor", help="Who is written into the history; by default this process's user.")
]
Namespace = Annotated[str, typer.Option("--namespace", help="Where names are looked up and adapters searched.")]
OneNamespace = Annotated[str | None, typer.Option("--namespace", help="Only this namespace; by default all of them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
SamplesFile = Annotated[
    str | None,
    typer.Option(
        "--samples",
        help='JSON lines, each a text or an object with "inputs"; a .txt has plain lines; - is stdin.',
        metavar="FILE",
    ),
]
DropSamples = Annotated[bool, typer.Option("--drop-samples", help="Forget the samples' texts once they are embedded.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit; pinned to its commit.")]
OwnBase = Annotated[str | None, typer.Option("--base-model", help="The base that the adapter must be for.")]
BaseModelFilter = Annotated[str | None, typer.Option("--base-model", help="Only adapters for this base model.")]
TagFilter = Annotated[
    list[str] | None, typer.Option("--tag", help="Only adapters that carry this tag; repeated: all of them.")
]
LicenseFilter = Annotated[
    list[str] | None, typer.Option("--license", help="Only adapters under this licence; repeated: under one of them.")
]
ScoreFilter = Annotated[
    list[MinScore] | None,
    typer.Option(
        "--scored",
        parser=_min_score,
        metavar="TASK/METRIC=VALUE",
        help="Only adapters whose recorded score is at least this; may be repeated.",
    ),
]
TrustFilter = Annotated[
    Trust,
    typer.Option(
        "--min-trust",
        help="high: only vectors of given samples; medium: also of the card's examples; low: guesses too.",
    ),
]
Floor = Annotated[
    str | None,
    typer.Option(
        "--min-score",
        metavar="COSINE|auto",
        help="Drop adapters below this cosine; auto: those that do not fit, as lora-hub calibrate found.",
    ),
]
Rerank = Annotated[
    bool | None,
    typer.Option(
        "--rerank/--no-rerank",
        help="Put the nearest in order by their samples' words too; by default as the encoder says.",
        show_default=False,
    ),
]
NearestCount = Annotated[int, typer.Option("-k", help="How many adapters to retrieve for a prompt.")]
