"""What every command shares: one value as its result, shown to people or as JSON, and errors without a traceback."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, ParamSpec

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from lora_hub_sdk.errors import LoraHubError

_P = ParamSpec("_P")
#: Columns where nobody watches: rich would assume 80 and cut tables that go into a file or a pipe.
_UNWATCHED_WIDTH: Final = 160


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found: ``data`` for ``--json``, ``view`` for people."""

    data: Any
    view: RenderableType
    exit_code: int = 0


def command(
    app: typer.Typer, name: str, *, ignore_unknown_options: bool = False
) -> Callable[[Callable[_P, Outcome]], Callable[_P, Outcome]]:
    """Add a function as a command. It returns an ``Outcome`` and has a keyword ``as_json``.

    While it runs, standard output belongs to standard error, so that no library's chatter mixes with the result.
    """

    def add(body: Callable[_P, Outcome]) -> Callable[_P, Outcome]:
        @functools.wraps(body)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
            as_json = bool(kwargs["as_json"])
            with errors_reported(as_json), contextlib.redirect_stdout(sys.stderr):
                outcome = body(*args, **kwargs)
            if as_json:
                _print_json(outcome.data)
            else:
                _stdout().print(outcome.view)
            if outcome.exit_code:
                raise typer.Exit(outcome.exit_code)

        app.command(name, context_settings={"ignore_unknown_options": ignore_unknown_options})(run)
        return body

    return add


def error_data(error: Exception) -> dict[str, str]:
    """An error as JSON knows it."""
    return {"type": type(error).__name__, "message": str(error)}


def stderr() -> Console:
    """The console for progress, logs and errors; made anew, as tests and pipes exchange the stream."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def errors_reported(as_json: bool) -> Iterator[None]:
    """Inside of it, the SDK's errors end the program with status 1, without a traceback."""
    try:
        yield
    except LoraHubError as error:
        if as_json:
            _print_json({"error": error_data(error)})
        stderr().print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise typer.Exit(1) from error


def _stdout() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNWATCHED_WIDTH)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, ensure_ascii=False, indent=2) + "\n")
