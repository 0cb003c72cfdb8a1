"""What a child process does from its start until it is killed or has reported."""

from __future__ import annotations

import mmap
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

from lora_hub_sdk.hub import LoraHub
from tests.registry.report import Collected, Diary, Report, collect, look
from tests.registry.steps import DieAt, watch_steps
from tests.registry.worker import Call, Kind, Place, forking

_PHASE_BYTES: Final = 64
#: How often each kind of call is made, where it can be.
_SHARES: Final[dict[Kind, int]] = {
    "register": 5, "update": 3, "remove": 2, "retire": 1, "restore": 1, "score": 1, "search": 2, "gc": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """What a child sends: a call that begins or is done, or what it found, or the error that ended it."""

    what: Literal["begins", "done", "found", "collected", "diary", "failed"]
    call: Call | None = None
    report: Report | None = None
    collected: Collected | None = None
    diary: Diary | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """What can be registered: each repository with its revisions, and folders by name."""

    repositories: dict[str, tuple[str, ...]]
    folders: dict[str, str]


class Life:
    """A child process, and what it told."""

    def __init__(self, act: Callable[..., None], *args: Any) -> None:
        context = forking()
        self._reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_guarded, args=(act, writer, *args))
        self._process.start()
        writer.close()
        self.told: list[Told] = []

    def hear(self, seconds: float | None = None) -> bool:
        """Take what it tells next; False where it tells nothing in that time, or never will."""
        try:
            if not self._reader.poll(seconds):
                return False
            self.told.append(self._reader.recv())
        except (EOFError, OSError):  # the second where it died within a message
            return False
        return True

    def hear_for(self, seconds: float) -> None:
        """Take what it tells during that time."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self.hear(left):
            pass

    def kill(self) -> None:
        """Kill it, and take what it had told before."""
        self._process.kill()
        self.end()

    def end(self) -> int | None:
        """Wait until it ends, and take all that it tells; returns its exit code, or the negative signal."""
        while self.hear():
            pass
        self._process.join()
        self._reader.close()
        return self._process.exitcode

    def last(self, what: str) -> Told:
        """The latest message of a kind."""
        return next(told for told in reversed(self.told) if told.what == what)


def _guarded(act: Callable[..., None], pipe: Connection, *args: Any) -> None:
    try:
        act(pipe, *args)
    except BaseException:
        pipe.send(Told("failed", error=traceback.format_exc()))


def read_phase(file: Path) -> str:
    """The last step that a working process reached."""
    return file.read_bytes().rstrip(b"\0").decode()


def work(pipe: Connection, place: Place, offer: Offer, seed: int, phase: Path) -> None:
    """Report what is there, then call at random for ever; a call is told when it begins, and when it returned."""
    phase.write_bytes(bytes(_PHASE_BYTES))
    with phase.open("r+b") as file, mmap.mmap(file.fileno(), _PHASE_BYTES) as page:

        def note(step: str) -> None:
            page[:] = step.encode().ljust(_PHASE_BYTES, b"\0")

        watch_steps(note)
        hub = place.open("worker")
        pipe.send(Told("found", report=look(hub, Path(place.database))))
        random = Random(seed)
        while True:
            call = _choose(random, hub, offer)
            pipe.send(Told("begins", call))
            call.make(hub)
            pipe.send(Told("done", call))


def die_at(
    pipe: Connection, place: Place, prepare: Sequence[Call], calls: Sequence[Call], step: str, count: int
) -> None:
    """Prepare, then call until the step is reached for the ``count``-th time, where this process kills itself."""
    trap = DieAt(step, count)
    watch_steps(trap)
    hub = place.open("victim")
    for call in prepare:
        call.make(hub)
    # The index is where SQL is before the calls that shall break off.
    hub.search("anything")
    pipe.send(Told("found", report=look(hub, Path(place.database))))
    trap.arm()
    for call in calls:
        call.make(hub)


def reopen(
    pipe: Connection, place: Place, calls: Sequence[Call] = (), rest: Sequence[Call] = (), repo_id: str = "*"
) -> None:
    """Report what is there, call, collect, report again, and call the rest; see ``report.collect``."""
    with place.open("heir") as hub:
        pipe.send(Told("found", report=look(hub, Path(place.database))))
        for call in calls:
            call.make(hub)
        pipe.send(Told("collected", collected=collect(hub, place.cache, repo_id)))
        pipe.send(Told("found", report=look(hub, Path(place.database))))
        for call in rest:
            call.make(hub)


def _choose(random: Random, hub: LoraHub, offer: Offer) -> Call:
    known = {adapter.name: adapter for adapter in hub.list()}
    absent = [name for name in (*offer.repositories, *offer.folders) if name not in known]
    active = [name for name, adapter in known.items() if adapter.state == "active"]
    retired = [name for name, adapter in known.items() if adapter.state == "retired"]
    by_kind: dict[Kind, list[str]] = {
        "register": absent, "update": list(known), "remove": list(known), "retire": active, "restore": retired,
        "score": active, "search": active, "gc": [""],
    }  # fmt: skip
    shares = {kind: share for kind, share in _SHARES.items() if by_kind[kind]}
    (kind,) = random.choices(list(shares), list(shares.values()))
    name = random.choice(by_kind[kind])
    revisions = offer.repositories.get(name)
    fresh = tuple(f"{name} sample {random.random()}" for _ in range(2))
    if kind == "register":
        return Call(kind, name, offer.folders.get(name, name), random.choice(revisions) if revisions else None, fresh)
    if kind == "update":
        new = random.random() < 0.5 or revisions is None
        return Call(kind, name, "", random.choice(revisions) if revisions else None, fresh if new else None)
    if kind == "search":
        return Call(kind, name, samples=hub.samples(name))
    return Call(kind, name)
