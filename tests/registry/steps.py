"""The steps of a hub's calls, and how a process dies at one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_hub_sdk.hub import LoraHub
from tests.registry.worker import HashEncoder

Hit = Callable[[str], None]


def die() -> None:
    """At once, as if the machine's power went, as far as this process is concerned."""
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt:
    """Kills this process at the ``count``-th time that a step is reached after ``arm``."""

    def __init__(self, step: str, count: int) -> None:
        self._step = step
        self._left: float = float("inf")
        self._count = count

    def arm(self) -> None:
        self._left = self._count

    def __call__(self, step: str) -> None:
        if step == self._step:
            self._left -= 1
            if self._left <= 0:
                die()


def watch_steps(hit: Hit) -> None:
    """Have ``hit`` called with the name of each step of this process's hubs, from now on until the process ends."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _cache_manager
    from sqlalchemy import Engine, event

    from lora_hub_sdk import intake
    from lora_hub_sdk.registry import gc
    from lora_hub_sdk.registry.chroma_index import ChromaIndex
    from lora_hub_sdk.registry.source import HubSource
    from lora_hub_sdk.registry.store import SqlStore

    def around(owner: Any, attribute: str, before: str | None, after: str | None) -> None:
        real = getattr(owner, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                hit(before)
            result = real(*args, **kwargs)
            if after is not None:
                hit(after)
            return result

        setattr(owner, attribute, call)

    around(HubSource, "_ask", "resolving", "resolved")
    around(SqlStore, "note_pull", None, "download noted")
    around(HubSource, "_download", "before a file", "after a file")
    around(file_download, "_chmod_and_move", "file arrived", None)
    around(file_download, "_create_symlink", "file stored", "file linked")
    around(HubSource, "pull", None, "pulled")
    around(intake, "admit", "admitting", "admitted")
    around(HashEncoder, "encode", "embedding", None)
    for change in ("add", "replace", "set_state", "remove"):
        around(SqlStore, change, "before the transaction", "committed")
    around(ChromaIndex, "delete", "before deleting vectors", "vectors deleted")
    around(ChromaIndex, "put", "before putting vectors", "vectors put")
    around(ChromaIndex, "_record", "before recording a partition", None)
    around(ChromaIndex, "set_stamp", "before the stamp", "stamped")
    around(ChromaIndex, "search", "searching", None)
    around(gc, "_remove", "before collecting", "files removed")
    around(_cache_manager, "_try_delete_path", None, "something removed")
    around(SqlStore, "forget_pull", None, "pull forgotten")
    around(LoraHub, "__init__", "opening", "opened")

    def replace(self: Path, target: Path, *, real: Callable[[Path, Path], Path] = Path.replace) -> Path:
        if self.suffix == ".draft":
            hit("branch drafted")
        return real(self, target)

    setattr(Path, "replace", replace)  # noqa: B010 (mypy knows the method)
    real_change = SqlStore._change

    @contextmanager
    def watched(self: SqlStore) -> Iterator[Any]:
        with real_change(self) as inside:
            yield inside
            inside.session.flush()
            hit("before the commit")

    SqlStore._change = watched  # type: ignore[method-assign]

    def written(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith(("INSERT INTO", "DELETE FROM", "UPDATE")):
            hit("statement written")

    event.listen(Engine, "after_cursor_execute", written)
