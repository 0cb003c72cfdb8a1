"""One process of many that work on one registry at once, and what it did and saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from random import Random
from typing import Final

from lora_hub_sdk.errors import AdapterNotFoundError, ConflictError, NameTakenError
from lora_hub_sdk.hub import LoraHub
from tests.registry.lives import Told
from tests.registry.report import Diary
from tests.registry.worker import Call, Kind, Place

#: Seconds that the slowest process may be late.
PATIENCE: Final = 120.0
RACES: Final = 3
_KINDS: Final[tuple[Kind, ...]] = (
    "register", "register", "update", "update", "update", "remove", "retire", "restore", "score", "search", "search",
    "gc",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Claim:
    """What any search must show from now on: an adapter at a revision, or nothing (None), for a text."""

    name: str
    revision: str | None
    text: str


class Member:
    """Works on names of its own, which it checks strictly, and on names that all share.

    Args:
        repositories: what can be registered, each with two revisions.
        claims: to the neighbour on the right, who checks and acknowledges.
        asked: from the neighbour on the left.
    """

    def __init__(
        self,
        hub: LoraHub,
        number: int,
        repositories: dict[str, tuple[str, ...]],
        claims: Connection,
        asked: Connection,
    ) -> None:
        self.diary = Diary()
        self._hub = hub
        self._number = number
        self._random = Random(number)
        self._repositories = repositories
        self._claims, self._asked = claims, asked
        self._waiting = False
        self._left_is_done = False
        self._own = Claim(f"own-{number}", None, "")
        self._texts = 0

    def race(self, meet: Callable[[], object]) -> None:
        """Register what all others register in the same moment: first the same content, then others' too."""
        for count in range(RACES):
            for name, revision in ((f"race-{count}", 0), (f"rival-{count}", self._number % 2)):
                source, commits = sorted(self._repositories.items())[count % len(self._repositories)]
                meet()
                try:
                    found = self._hub.register(source, name=name, revision=commits[revision], samples=[f"{name} one"])
                    self.diary.races.append((name, found.id))
                except NameTakenError:
                    self.diary.races.append((name, None))

    def work(self, seconds: float) -> None:
        """Call after call for that long, and the neighbour's claims in between."""
        until, kinds = time.monotonic() + seconds, [*_KINDS]
        while time.monotonic() < until:
            self._random.shuffle(kinds)
            for kind in kinds:
                self._answer()
                self._on_own(kind)
                self._answer()
                self._on_shared(kind)

    def settle(self) -> None:
        """Answer until neither neighbour waits for anything any more."""
        self._claims.send(None)
        until = time.monotonic() + PATIENCE
        while self._waiting or not self._left_is_done:
            self._answer()
            time.sleep(0.001)
            assert time.monotonic() < until, "a neighbour never answered"

    def conclude(self, texts: list[str]) -> None:
        """Look at the end, when nobody writes any more."""
        found = self._hub.search_many(texts, k=5)
        self.diary.hits = [[(hit.adapter.name, hit.adapter.revision) for hit in row] for row in found]
        until = time.monotonic() + PATIENCE
        # What another process was still putting when its adapter went, that process takes out when it next looks.
        while not (verified := self._hub.verify()).agrees and time.monotonic() < until:
            time.sleep(0.05)
        self.diary.verified = verified

    # -- names of its own ----------------------------------------------------------------------------------------------

    def _on_own(self, kind: Kind) -> None:
        if self._waiting:
            return
        name, revision = self._own.name, self._own.revision
        source, commits = sorted(self._repositories.items())[self._number % len(self._repositories)]
        if revision is None and kind in ("register", "update"):
            commit, text = self._random.choice(commits), self._text(name)
            self._do(Call("register", name, source, commit, (text,)), own=True)
            self._claim(Claim(name, commit, text))
        elif revision is not None and kind == "update":
            commit, text = self._random.choice(commits), self._text(name)
            self._do(Call("update", name, "", commit, (text,)), own=True)
            self._claim(Claim(name, commit, text))
        elif revision is not None and kind == "remove":
            self._do(Call("remove", name), own=True)
            self._claim(Claim(name, None, self._own.text))
        elif revision is not None and kind == "retire":
            self._do(Call("retire", name), own=True)
            self._check(Claim(name, None, self._own.text))
            self._do(Call("restore", name), own=True)
            self._claim(self._own)

    def _claim(self, claim: Claim) -> None:
        self._check(claim)
        self._own = claim
        self._claims.send(claim)
        self._waiting = True

    def _answer(self) -> None:
        while not self._left_is_done and self._asked.poll():
            claim = self._asked.recv()
            if claim is None:
                self._left_is_done = True
                break
            self._check(claim)
            self.diary.counts["claim checked"] += 1
            self._asked.send(True)
        while self._waiting and self._claims.poll():
            self._claims.recv()
            self._waiting = False

    def _check(self, claim: Claim) -> None:
        hits = {hit.adapter.name: hit for hit in self._hub.search(claim.text, k=5)}
        seen = hits.get(claim.name)
        found = None if seen is None else seen.adapter.revision
        assert found == claim.revision, f"process {self._number} sees {claim.name} at {found}, committed is {claim}"
        assert seen is None or seen.score > 0.99, f"process {self._number} finds {claim.name} by an old vector: {seen}"

    # -- names that all share ------------------------------------------------------------------------------------------

    def _on_shared(self, kind: Kind) -> None:
        name = f"shared-{self._random.randrange(4)}"
        source, commits = sorted(self._repositories.items())[int(name[-1]) % len(self._repositories)]
        commit, text = self._random.choice(commits), self._text(name)
        match kind:
            case "register":
                self._do(Call(kind, name, source, commit, (text,)))
            case "update":
                self._do(Call(kind, name, "", commit, (text,)))
            case "search":
                self._do(Call(kind, name, samples=(text,)))
            case _:
                self._do(Call(kind, name))

    def _do(self, call: Call, *, own: bool = False) -> None:
        try:
            call.make(self._hub)
        except (AdapterNotFoundError, ConflictError, NameTakenError) as refusal:
            if own:
                raise
            self.diary.counts[type(refusal).__name__] += 1
            return
        self.diary.counts[call.kind] += 1
        if call.kind in ("register", "update", "remove", "score"):
            self.diary.changes.append(call)

    def _text(self, name: str) -> str:
        self._texts += 1
        return f"{name}: text {self._texts} of {self._number}"


def join(
    pipe: Connection,
    number: int,
    place: Place,
    repositories: dict[str, tuple[str, ...]],
    seconds: float,
    together: Barrier,
    claims: Connection,
    asked: Connection,
) -> None:
    """Open with all others at once, race, work, and tell the diary."""

    def meet() -> None:
        together.wait(PATIENCE)

    meet()
    with place.open(f"process {number}") as hub:
        member = Member(hub, number, repositories, claims, asked)
        member.race(meet)
        member.work(seconds)
        member.settle()
        meet()
        member.conclude([f"shared-{count}: probe" for count in range(4)])
        meet()
        pipe.send(Told("diary", diary=member.diary))


def open_new(pipe: Connection, places: Sequence[Place], together: Barrier) -> None:
    """Open each registry at the same moment as all others, before any of them exists."""
    for place in places:
        together.wait(PATIENCE)
        place.open("anyone").close()
