"""Many adapters from one file of JSON lines; a line that is wrong is an outcome like any other."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from lora_hub_sdk.cli.adapters import adapter_data
from lora_hub_sdk.cli.command import Outcome, error_data
from lora_hub_sdk.cli.progress import bar
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.hub import LoraHub
    from lora_hub_sdk.intake import RegisterOutcome

#: What a line's object may hold: the fields of ``AdapterRequest`` that JSON can express.
FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "reference": (str,),
    "samples": (str, list),
    "embedding": (list,),
    "revision": (str,),
    "name": (str,),
    "base_model": (str,),
    "description": (str,),
    "tags": (list,),
    "namespace": (str,),
    "keep_samples": (bool,),
}
_KINDS: Final = {str: "a text", list: "a list", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file: what it asks for, or why it asks for nothing that can be done."""

    number: int
    request: dict[str, Any] | None
    problem: ConfigurationError | None = None


def read_lines(source: str, namespace: str) -> list[Line]:
    """The lines of a file, ``-`` for standard input, that are not blank.

    Args:
        namespace: of those that name none.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"--from-file {source!r} cannot be read: {error}") from error
    folder = Path() if source == "-" else Path(source).parent
    numbered = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [_line(number, line, folder, namespace) for number, line in numbered if line.strip()]


def register_lines(hub: LoraHub, lines: Sequence[Line], *, workers: int, as_json: bool) -> Outcome:
    """Register what the lines ask for; exit code 1 where any of them failed."""
    requests = [line.request for line in lines if line.request is not None]
    done = 0
    with bar("registering", as_json=as_json) as move:

        def count(_: RegisterOutcome) -> None:
            nonlocal done
            done += 1
            move(done, len(requests))

        outcomes = iter(hub.register_many(requests, workers=workers, on_done=count))
    rows = [_row(line, None if line.request is None else next(outcomes)) for line in lines]
    return Outcome(rows, _table(rows), exit_code=1 if any(row["error"] for row in rows) else 0)


def _line(number: int, content: bytes, folder: Path, namespace: str) -> Line:
    try:
        return Line(number, _request(content, folder, namespace))
    except ConfigurationError as problem:
        return Line(number, None, problem)


def _request(content: bytes, folder: Path, namespace: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"no JSON: {error}; a reference needs quotes") from error
    fields = {"reference": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("reference"), str):
        raise ConfigurationError('expected a reference, or an object with a "reference"')
    given = {field: found for field, found in fields.items() if found is not None}
    for field, found in given.items():
        _check_field(field, found)
    if isinstance(given.get("samples"), str):
        given["samples"] = folder / given["samples"]
    return {"namespace": namespace, **given}


def _check_field(field: str, found: object) -> None:
    kinds = FIELDS.get(field)
    if kinds is None:
        raise ConfigurationError(f"unknown field {field!r}; known are {', '.join(FIELDS)}")
    wrong_tag = field == "tags" and isinstance(found, list) and not all(isinstance(tag, str) for tag in found)
    if not isinstance(found, kinds) or wrong_tag:
        expected = "a list of texts" if field == "tags" else " or ".join(_KINDS[kind] for kind in kinds)
        raise ConfigurationError(f"{field}={str(found)[:80]!r}: expected {expected}")


def _row(line: Line, outcome: RegisterOutcome | None) -> dict[str, Any]:
    error = line.problem if outcome is None else outcome.error
    adapter = None if outcome is None else outcome.adapter
    return {
        "line": line.number,
        "reference": None if outcome is None else outcome.reference,
        "adapter": None if adapter is None else adapter_data(adapter),
        "error": None if error is None else error_data(error),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    good = sum(row["error"] is None for row in rows)
    table = Table(title=f"{good} of {len(rows)} adapters are registered", title_justify="left")
    table.add_column("line", justify="right")
    table.add_column("reference", overflow="fold")
    table.add_column("outcome", overflow="fold")
    for row in rows:
        adapter, error = row["adapter"], row["error"]
        told = f"{adapter['name']} at {adapter['revision'][:12]}" if error is None else f"error: {error['message']}"
        table.add_row(str(row["line"]), Text(row["reference"] or "-"), Text(told, style="red" if error else ""))
    return table
