"""All systems over one set of questions in one run, on one engine; killed at any moment, it goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.composition.gate_choice import gate_for
from lora_hub_sdk.errors import (
    ConfigurationError,
    LoraHubError,
    MissingExtraError,
    NoAdaptersError,
    SamplesError,
    UnsupportedRouteError,
)
from lora_hub_sdk.evaluation.answers import Answer, AnswerFile
from lora_hub_sdk.evaluation.asking import ask
from lora_hub_sdk.evaluation.metrics import METRICS, scores
from lora_hub_sdk.evaluation.record import RECORD_FILE, RunRecord, SystemRecord, about_run
from lora_hub_sdk.evaluation.results import Results, write_questions
from lora_hub_sdk.evaluation.routes import find_routes, route_key
from lora_hub_sdk.evaluation.systems import system
from lora_hub_sdk.types import Completion, Route, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.engine.request import Request
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedSet
    from lora_hub_sdk.evaluation.system import System

#: New tokens of an answer: labels are short.
LONGEST: Final[Mapping[str, int]] = {"em": 16}
LONGEST_ELSE: Final = 64
#: Why a system cannot run on this ground, while others can.
_CANNOT: Final = (ConfigurationError, MissingExtraError, NoAdaptersError, SamplesError, UnsupportedRouteError)


def run(
    ground: Ground,
    questions: MixedSet,
    systems: Sequence[str | System],
    *,
    output: str | os.PathLike[str],
    max_new_tokens: Mapping[str, int] | None = None,
    batch: int = 256,
    strict: bool = True,
    listed: bool = True,
    told: Mapping[str, str] | None = None,
) -> Results:
    """Ask every system every question, and keep each answer with its route in ``<output>/answers.jsonl``.

    The routes of all systems are found first. Equal routes of a question are answered once. Then the engine is handed
    one question after another, by all systems that still need its answer, so that neighbours in a batch are of all
    systems. Each answer is in the file as soon as it is there. The next run with the same arguments asks what is not
    there, and what failed.

    Args:
        systems: by name, or any ``System``; those before them in the same folder keep their answers.
        output: a new folder, or one of the same questions on the same ground.
        max_new_tokens: by metric; where it names none, 16 for "em" and 64 for others.
        batch: how many requests the engine holds at most.
        strict: whether a system that cannot run here stops the run; else it is left out, and the record says why.
        listed: whether the systems are meant for the table; those of a figure alone are not.
        told: what the report shall say of the run, as ``{"date": ..., "command": ...}``; kept in the record.

    Raises:
        ConfigurationError: nothing to ask, a metric or a system that nobody knows, a system that cannot run, a folder
            of another run, or one that another process works on.
        MissingExtraError: a system needs packages that are not installed.
        As ``hub.engine``, and what ends the engine.
    """
    chosen = _chosen(systems)
    lengths = _lengths(questions, max_new_tokens or {})
    if batch < 1:
        raise ConfigurationError(f"batch={batch}: expected 1 or more")
    folder = Path(output).absolute()
    for path in (folder, ground.folder):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"folder {str(path)!r} cannot be made: {error}; give another one") from error
    with _alone(folder):
        record = _record(ground, questions, lengths, folder)
        record.told.update(told or {})
        with AnswerFile(folder) as file:
            runner = _Runner(ground, questions, lengths, folder, record, file)
            runner.route(chosen, strict=strict, listed=listed)
            runner.answer(batch)
    return Results.read(folder)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An answer that is not there: the first system is asked, the others have the same route."""

    question: int
    key: str
    routes: dict[str, Route]


class _Runner:
    """One run over one folder that it has for itself."""

    def __init__(
        self,
        ground: Ground,
        questions: MixedSet,
        lengths: Mapping[str, int],
        folder: Path,
        record: RunRecord,
        file: AnswerFile,
    ) -> None:
        self._ground = ground
        self._questions = questions
        self._lengths = lengths
        self._folder = folder
        self._record = record
        self._file = file
        self._wanted: dict[tuple[int, str], _Wanted] = {}
        #: Digests of the gates that routes were found with, by the strategy, and the first system that used each.
        self._gates: dict[str, tuple[str, str]] = {}

    def route(self, systems: Sequence[System], *, strict: bool, listed: bool) -> None:
        """Prepare the systems and find what is still to be answered."""
        from tqdm.auto import tqdm

        there = {(one.question, one.key): one for one in self._file.known.values() if one.text is not None}
        with tqdm(systems, unit="system", disable=not self._ground.progress) as bar:
            for one in bar:
                bar.set_description(f"preparing {one.name}")
                try:
                    routes = self._routes(one, listed)
                    keys = [self._key(one.name, *found) for found in enumerate(routes)]
                except _CANNOT as error:
                    if strict:
                        raise _named(one.name, error) from error
                    self._record.left_out[one.name] = str(error)
                else:
                    self._record.left_out.pop(one.name, None)
                    self._plan(one.name, routes, keys, there)
                self._record.write(self._folder)

    def answer(self, window: int) -> None:
        """Ask for what is not there."""
        from tqdm.auto import tqdm

        ground = self._ground
        self._check_gates()
        engine = ground.hub.engine(ground.base_model, ground.settings)
        wanted = sorted(self._wanted.values(), key=lambda one: one.question)
        total, unwritten, began = sum(len(one.routes) for one in wanted), 0, monotonic()

        def note() -> None:
            nonlocal began, unwritten
            now = monotonic()
            self._record.answer_s += now - began
            self._record.write(self._folder)
            began, unwritten = now, 0

        with tqdm(total=total, desc="answering", unit="answer", disable=not ground.progress) as bar:
            try:
                for one, found in ask(engine, ((one, self._request(one)) for one in wanted), window):
                    self._keep(one, found)
                    bar.update(len(one.routes))
                    unwritten += 1
                    if unwritten >= window:
                        note()
            finally:
                note()

    def _routes(self, one: System, listed: bool) -> list[Route | LoraHubError | None]:
        began = monotonic()
        one.prepare(self._ground)
        prepared = monotonic()
        routings = one.routings(self._ground, self._questions.rows)
        places = [place for place, routing in enumerate(routings) if routing is not None]
        asked = [self._questions.rows[place].inputs for place in places]
        found = find_routes(self._ground, asked, [routing for routing in routings if routing is not None])
        routes: list[Route | LoraHubError | None] = [None] * len(self._questions)
        for place, route in zip(places, found, strict=True):
            routes[place] = route
        known = self._record.systems.setdefault(one.name, SystemRecord(listed=False))
        known.listed, known.learns = known.listed or listed, one.learns
        known.prepare_s += prepared - began
        known.route_s += monotonic() - prepared
        return routes

    def _plan(
        self,
        name: str,
        routes: Sequence[Route | LoraHubError | None],
        keys: Sequence[str],
        there: Mapping[tuple[int, str | None], Answer],
    ) -> None:
        """What needs no answer, or has one, is written at once."""
        now = []
        for place, (route, key) in enumerate(zip(routes, keys, strict=True)):
            known = self._file.known.get((name, place))
            if not isinstance(route, Route):
                told = None if route is None else _told(route)
                answer = self._blank(name, place, error=told)
                if answer != known:
                    now.append(answer)
                continue
            if known is not None and known.text is not None and known.key == key:
                continue
            same = there.get((place, key))
            if same is not None:
                source = same.same_as or same.system
                shared = None if source == name else source
                now.append(replace(same, system=name, route=route.as_dict(), same_as=shared))
                continue
            self._wanted.setdefault((place, key), _Wanted(place, key, {})).routes[name] = route
        self._file.append(now)

    def _request(self, one: _Wanted) -> Request:
        from lora_hub_sdk.engine.request import Request

        row, route = self._questions.rows[one.question], next(iter(one.routes.values()))
        sampling = Sampling(self._lengths[row.metric])
        return Request(row.inputs, route, sampling, self._ground.template, client="benchmark")

    def _keep(self, one: _Wanted, found: Completion | LoraHubError) -> None:
        row, first = self._questions.rows[one.question], next(iter(one.routes))
        answer = self._blank(first, one.question, key=one.key)
        if isinstance(found, LoraHubError):
            answer = replace(answer, error=_told(found))
        else:
            told = scores(row.metric, found.text, row.targets)
            answer = replace(
                answer,
                text=found.text,
                score=told[METRICS[row.metric].name],
                scores=told,
                finish_reason=found.finish_reason,
                tokens=found.usage.completion_tokens,
            )
            self._record.answered += 1
            self._record.tokens += answer.tokens
        self._file.append(
            replace(answer, system=name, route=route.as_dict(), same_as=None if name == first else first)
            for name, route in one.routes.items()
        )

    def _blank(self, name: str, place: int, *, key: str | None = None, error: str | None = None) -> Answer:
        row = self._questions.rows[place]
        return Answer(name, place, row.task, row.domain, row.metric, key=key, error=error)

    def _key(self, name: str, place: int, route: Route | LoraHubError | None) -> str:
        """Empty where there is no route."""
        if not isinstance(route, Route):
            return ""
        return route_key(route, self._gate_of(name, route), self._lengths[self._questions.rows[place].metric])

    def _gate_of(self, name: str, route: Route) -> str | None:
        gate = gate_for(route, self._ground.hub.gates.get(route.base_model, {}), route.base_model)
        if gate is None:
            return None
        was, first = self._gates.setdefault(route.strategy, (gate.digest, name))
        if was != gate.digest:
            raise ConfigurationError(
                f"systems {first!r} and {name!r} use different gates for strategy {route.strategy!r}, of which an "
                "engine keeps one; ask them in runs of their own, into the same folder"
            )
        return gate.digest

    def _check_gates(self) -> None:
        """What a later system put in use instead would answer the earlier one's questions."""
        for wanted in self._wanted.values():
            for name, route in wanted.routes.items():
                self._gate_of(name, route)


def _chosen(systems: Sequence[str | System]) -> list[System]:
    if isinstance(systems, str) or not systems:
        raise ConfigurationError(f"systems={systems!r}: expected a list of one name or more")
    found = (system(one) if isinstance(one, str) else one for one in systems)
    return list({one.name: one for one in found}.values())


def _lengths(questions: MixedSet, given: Mapping[str, int]) -> dict[str, int]:
    """Of every metric of the questions."""
    if not len(questions):
        raise ConfigurationError("there is no question to ask; give a set with one row or more")
    lengths = {
        metric: given.get(metric, LONGEST.get(metric, LONGEST_ELSE))
        for metric in sorted({row.metric for row in questions.rows})
    }
    for metric, length in lengths.items():
        scores(metric, "one word", "another word")  # not known, or not installed: told before hours of answering
        if length < 1:
            raise ConfigurationError(f"max_new_tokens[{metric!r}]={length}: expected 1 or more")
    return lengths


def _record(ground: Ground, questions: MixedSet, lengths: Mapping[str, int], folder: Path) -> RunRecord:
    """The folder's, once it is known to be of the same run, or a new one."""
    about = about_run(ground, questions, lengths)
    training = ground.training.digest if len(ground.training) else ""
    if (folder / RECORD_FILE).exists():
        record = RunRecord.read(folder)
        record.check_same(about, training, folder)
    else:
        record = RunRecord(about)
        write_questions(questions, folder)
    record.training = training or record.training
    record.adapters, record.own = len(ground.pool()), dict(ground.own)
    record.write(folder)
    return record


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else works on the folder meanwhile; a process that dies lets go of it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigurationError(
            f"output={str(folder)!r}: another run works on this folder; wait for it, or give another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _named(name: str, error: LoraHubError) -> LoraHubError:
    if isinstance(error, MissingExtraError):
        return error
    return ConfigurationError(f"system {name!r} cannot run: {error}")


def _told(error: LoraHubError) -> str:
    return f"{type(error).__name__}: {error}"
