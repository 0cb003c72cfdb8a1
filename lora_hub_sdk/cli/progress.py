"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lora_hub_sdk.cli.command import stderr


def bars(*, hidden: bool = False) -> Progress:
    """Bars with a count and the time that passed."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr(),
        disable=hidden,
    )


@contextmanager
def bar(what: str, *, as_json: bool) -> Iterator[Callable[[int, int], None]]:
    """One bar, moved by (done, total); only where somebody watches, so never with ``--json``."""
    with bars(hidden=as_json or not stderr().is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield move
