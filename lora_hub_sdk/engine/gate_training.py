"""Training of a RAMoLE gate: base model and adapters are frozen, small routers learn which adapter each token needs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from lora_hub_sdk.composition.ramole import Ramole
from lora_hub_sdk.composition.tensor_file import write_whole
from lora_hub_sdk.engine._gate_rows import GateRow, hold_out, read_gate_rows
from lora_hub_sdk.engine._recipe import Recipe
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.expert_pool import AdapterSource, finished, new_file, unweighable
from lora_hub_sdk.engine.fitting import Fitting
from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.retriever.tasks import Task, split_tasks
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter, Completion, Hit, Routing, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.composition.ramole import RouterLora
    from lora_hub_sdk.engine._training import Course
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.engine import Engine
    from lora_hub_sdk.engine.prompt import Template

# Inside the protocol ``list`` is a method.
Completions = list[Completion]
HitLists = list[list[Hit]]
Reference = str | os.PathLike[str]
GateRows = Iterable[Mapping[str, Any]] | str | os.PathLike[str]
#: Answers that are asked of the engine at a time; what came is kept.
_ASKED: Final = 64


class GateSource(AdapterSource, Protocol):
    """What a gate is trained on: a ``LoraHub``."""

    def samples(self, name: str, *, namespace: str) -> tuple[str, ...]: ...
    def search_many(
        self, prompts: Sequence[str], k: int, *, base_model: Reference, exclude: Sequence[str], namespace: str
    ) -> HitLists: ...
    def generate(
        self,
        prompts: Sequence[str],
        *,
        base_model: Reference,
        routing: Sequence[Routing],
        sampling: Sampling,
        template: Template,
        settings: ModelSettings | None,
    ) -> Completions: ...


@dataclass(frozen=True, slots=True)
class GateReport:
    """How a training went.

    Attributes:
        file: the gate.
        digest: of that file.
        trained: names of the adapters that it was trained on.
        unseen: names of the adapters that were kept out of it.
        skipped: why each other adapter of the base model took no part, by name.
        rows: how many it was trained on.
        held_out: how many its validation losses are of: other rows of the trained adapters, each with its nearest.
        steps: how many.
        seconds: of this run; 0 where the training had ended before.
        losses: of each step, with adapters dropped at random.
        validation: (steps done, loss) on the held-out rows.
        uniform_loss: of these rows where their adapters are weighed alike.
        own_loss: of these rows with the adapter of each alone.
    """

    file: Path
    digest: str
    trained: tuple[str, ...]
    unseen: tuple[str, ...]
    skipped: Mapping[str, str]
    rows: int
    held_out: int
    steps: int
    seconds: float
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    uniform_loss: float | None
    own_loss: float | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "file": str(self.file)}


@dataclass(frozen=True, kw_only=True)
class GateTrainer(Recipe):
    """Trains a RAMoLE gate (arXiv 2406.16989) by the language model's loss on answers.

    Each row's prompt is answered with its retrieved adapters. Some of these are dropped at random, so that a gate
    learns to judge adapters by what they do, and serves those that it never saw. Only the routers change.

    Attributes:
        width: of queries and keys.
        k: how many adapters a row chooses from.
        drop: with which probability each of them is left out.
        others: the share of rows that choose from their own adapter and random ones, not from the nearest.
        key_scale: how large the routers' first keys are; small ones begin with a uniform mixture.

    Raises:
        ConfigurationError: a value that makes no sense.
    """

    width: int = 8
    k: int = 3
    drop: float = 0.3
    others: float = 0.5
    key_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("width", "a whole number of 1 or more", lambda value: value >= 1, int)
        self._check(
            "k", "a whole number of 2 or more: of one adapter there is no choice", lambda value: value >= 2, int
        )
        self._check("key_scale", "a number above 0", lambda value: value > 0)
        self._check("drop", "a number from 0 to below 1", lambda value: 0 <= value < 1)
        self._check("others", "a number from 0 to 1", lambda value: 0 <= value <= 1)

    def fit(
        self,
        hub: GateSource,
        *,
        base_model: Reference,
        output: Reference,
        fraction: float = 1.0,
        rows: GateRows | None = None,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> GateReport:
        """Train on a random ``fraction`` of a base model's adapters in service, and write one safetensors file.

        A run that was killed goes on from its last checkpoint when it is called again with the same arguments, and one
        that ended is not repeated. Until then there is a folder ``<output>.part`` beside the file.

        Args:
            output: a new file, or that of the same training.
            rows: ``{"inputs", "targets", "adapter"}`` each, or a file of such JSON lines; those of adapters that are
                not trained on are left out. None takes the registry's samples, and each adapter's own greedy answers to
                them: then the gate learns to answer as the right adapter alone would.

        Raises:
            SamplesError: fewer than two adapters that a gate can weigh and that have rows.
            ConfigurationError: a fraction outside of (0, 1], rows of another form, a file of something else, or
                anything of ``hub.engine``.
        """
        file = new_file(output)
        engine = hub.engine(base_model, self.settings)
        pool = _pool(hub, engine, base_model, namespace, None if rows is None else read_gate_rows(rows))
        tasks = [Task(name, ()) for name in pool.rows]
        drawn, unseen = ({task.name for task in part} for part in split_tasks(tasks, fraction, self.seed))
        names = [name for name in pool.rows if name in drawn]
        answered = [row for name in names for row in pool.rows[name]]
        told = {
            "recipe": self.told(),
            "fraction": fraction,
            "rows": hashlib.sha256(json.dumps([asdict(row) for row in answered]).encode()).hexdigest(),
            "adapters": {name: pool.adapters[name].digest for name in names},
            "base_model": pool.base_model,
        }
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        held = finished(file, Ramole.load, key)
        seconds = 0.0
        if held is None:
            part = file.with_name(file.name + ".part")
            part.mkdir(exist_ok=True)
            if rows is None:
                answered = self._answered(hub, pool, answered, base_model, namespace, part)
            near = self._near(hub, pool, answered, names, base_model, namespace)
            kept, out = hold_out([row.adapter for row in answered], self.validation, self.validation_rows, self.seed)
            from lora_hub_sdk.engine._gate_run import learn

            factors = [pool.factors[name] for name in names]
            routers, course = learn(self, engine.base, factors, names, answered, (kept, out), near, part, key)
            held = _gate(routers, course, key, told, pool, names, sorted(unseen), (len(kept), len(out)))
            held.save(file)
            seconds = course.seconds
            shutil.rmtree(part, ignore_errors=True)
        return _report(file, held, pool.skipped, seconds)

    def _answered(
        self,
        hub: GateSource,
        pool: _Pool,
        rows: Sequence[GateRow],
        base_model: Reference,
        namespace: str,
        part: Path,
    ) -> list[GateRow]:
        """The rows with their own adapters' greedy answers; those that an earlier run got are kept."""
        from tqdm.auto import tqdm

        kept = _Answers(part / "answers.jsonl", f"{self.answer_tokens} {self.told()['template']}")
        keys = [kept.key(pool.adapters[row.adapter].digest, row.inputs) for row in rows]
        missing = [number for number, key in enumerate(keys) if key not in kept.found]
        with tqdm(total=len(rows), initial=len(rows) - len(missing), desc="answers", disable=not self.progress) as bar:
            for start in range(0, len(missing), _ASKED):
                asked = missing[start : start + _ASKED]
                completions = hub.generate(
                    [rows[number].inputs for number in asked],
                    base_model=base_model,
                    routing=[
                        Routing("selection", adapters=(rows[number].adapter,), namespace=namespace) for number in asked
                    ],
                    sampling=Sampling(self.answer_tokens),
                    template=self.template,
                    settings=self.settings,
                )
                for number, completion in zip(asked, completions, strict=True):
                    kept.found[keys[number]] = (completion.text, completion.finish_reason == "stop")
                kept.write()
                bar.update(len(asked))
        return [GateRow(row.inputs, row.adapter, *kept.found[key]) for row, key in zip(rows, keys, strict=True)]

    def _near(
        self,
        hub: GateSource,
        pool: _Pool,
        rows: Sequence[GateRow],
        names: Sequence[str],
        base_model: Reference,
        namespace: str,
    ) -> list[tuple[int, ...]]:
        """For each row the numbers of the k nearest of the adapters that are trained on."""
        others = [name for name in pool.everyone if name not in names]
        found = hub.search_many(
            [row.inputs for row in rows], self.k, base_model=base_model, exclude=others, namespace=namespace
        )
        number = {name: place for place, name in enumerate(names)}
        return [tuple(number[hit.adapter.name] for hit in hits) for hits in found]


@dataclass
class _Pool:
    """The adapters of a base model: those that a gate can weigh, with factors and rows, and why not the others."""

    base_model: str
    everyone: list[str]
    adapters: dict[str, Adapter] = field(default_factory=dict)
    factors: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[GateRow]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def _pool(
    hub: GateSource, engine: Engine, base_model: Reference, namespace: str, given: Sequence[GateRow] | None
) -> _Pool:
    """Only adapters that a gate can weigh and that have rows are in it; the others are told."""
    adapters = [one for one in hub.list(namespace=namespace, base_model=base_model) if one.state == "active"]
    fitting = Fitting(engine.base.modules, embedding=engine.base.embedding)
    pool = _Pool(adapters[0].base_model if adapters else str(base_model), [adapter.name for adapter in adapters])
    stray = sorted({row.adapter for row in given or ()} - set(pool.everyone))
    if stray:
        raise ConfigurationError(
            f"rows: no adapter {stray[0]!r} for base model {pool.base_model!r} is in service in namespace {namespace!r}"
        )
    for adapter in adapters:
        if given is None:
            texts = hub.samples(adapter.name, namespace=namespace)
            rows = [GateRow(text, adapter.name, "") for text in texts]
        else:
            rows = [row for row in given if row.adapter == adapter.name]
        if not rows:
            pool.skipped[adapter.name] = "it has no rows" if given is not None else "no samples of it were kept"
            continue
        factors = fitting.fit(load_factors(adapter))
        if why := unweighable(factors, engine.base.shapes):
            pool.skipped[adapter.name] = why
            continue
        pool.adapters[adapter.name], pool.rows[adapter.name], pool.factors[adapter.name] = adapter, rows, factors
    if len(pool.rows) < 2:
        why = "; ".join(f"{name}: {problem}" for name, problem in list(pool.skipped.items())[:5])
        raise SamplesError(
            "gate training",
            f"{len(adapters)} adapters for base model {pool.base_model!r} are in service in namespace {namespace!r}, "
            f"and {len(pool.rows)} can be trained on; a gate learns from the difference of two or more"
            + (why and f" ({why})"),
        )
    return pool


class _Answers:
    """Answers by the digest of what they are to, in one file of JSON lines."""

    def __init__(self, file: Path, settings: str) -> None:
        self._file, self._settings = file, settings
        self.found: dict[str, tuple[str, bool]] = {}
        if file.is_file():
            for line in file.read_text("utf-8").splitlines():
                key, text, finished = json.loads(line)
                self.found[key] = (text, finished)

    def key(self, digest: str, prompt: str) -> str:
        return hashlib.sha256(json.dumps([digest, self._settings, prompt]).encode()).hexdigest()

    def write(self) -> None:
        lines = [json.dumps([key, *answer]) + "\n" for key, answer in self.found.items()]
        write_whole(self._file, "".join(lines).encode())


def _gate(
    routers: Mapping[str, RouterLora],
    course: Course,
    key: str,
    told: Mapping[str, Any],
    pool: _Pool,
    names: Sequence[str],
    unseen: Sequence[str],
    counts: tuple[int, int],
) -> Ramole:
    training = {
        "key": key,
        "recipe": told["recipe"],
        "fraction": told["fraction"],
        "unseen": list(unseen),
        "rows": counts[0],
        "held_out": counts[1],
        **course.told(),
    }
    return Ramole(pool.base_model, routers, {name: pool.adapters[name].digest for name in names}, training)


def _report(file: Path, gate: Ramole, skipped: Mapping[str, str], seconds: float) -> GateReport:
    told = gate.training
    return GateReport(
        file=file,
        digest=gate.digest,
        trained=tuple(sorted(gate.trained)),
        unseen=tuple(told["unseen"]),
        skipped=dict(skipped),
        rows=told["rows"],
        held_out=told["held_out"],
        steps=len(told["losses"]),
        seconds=seconds,
        losses=tuple(told["losses"]),
        validation=tuple((step, loss) for step, loss in told["validation"]),
        uniform_loss=told["uniform_loss"],
        own_loss=told["own_loss"],
    )
