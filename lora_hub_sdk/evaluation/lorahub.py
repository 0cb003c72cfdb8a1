"""LoRAHub (arXiv 2307.13269): weights of random adapters by a search without gradients, their parameters averaged."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.tensor_file import write_whole
from lora_hub_sdk.errors import ConfigurationError, MissingExtraError, NoAdaptersError
from lora_hub_sdk.evaluation.mixed_set import MixedSet
from lora_hub_sdk.evaluation.plain import why_not_plain
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedRow
    from lora_hub_sdk.types import Adapter

#: Weights are searched from here below 0 to as much above, and their mean size counts as so much loss.
BOUND: Final = 1.5
PENALTY: Final = 0.05
#: What a loss that is no number counts as.
_WORST: Final = 1e6
#: The one search of all tasks together.
_ALL: Final = "all tasks"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Search:
    """What one search found; a line of its system's file.

    Attributes:
        task: whose rows it was made on.
        key: of everything that it depends on.
        adapters: those that were drawn; ``wanted`` is how many it should have been.
        weights: one for each. All 0: nothing better than the base model was found, and it answers.
        objective: of these weights: mean answer loss of the rows, in nats a token, with the penalty.
        base_objective: of the base model.
        evaluations: how many sets of weights were tried.
        seconds: how long it took.
    """

    task: str
    key: str
    adapters: tuple[str, ...]
    wanted: int
    weights: tuple[float, ...]
    objective: float
    base_objective: float
    evaluations: int
    seconds: float

    def routing(self, namespace: str) -> Routing:
        """How the task's questions are answered; weights that are all 0 are no route, so the base model is named."""
        if not any(self.weights):
            return Routing("base", namespace=namespace)
        return Routing("fusion", adapters=self.adapters, adapter_weights=self.weights, namespace=namespace)


@dataclass(frozen=True, slots=True)
class LoraHubSearch:
    """One search for each task of the training rows, or one for all of them; None for a row of another task.

    A search is kept in ``<name>.jsonl`` as soon as it has ended; one that was interrupted starts over.

    Attributes:
        mixed: one search on rows of all tasks, as for questions whose task nobody knows.
        count: adapters that are drawn for a search; of a smaller pool all are taken. Those that are no plain LoRA are
            passed over.
        rows: how many of the training rows a loss is of; drawn once for a search.
        budget: how many sets of weights are tried. The optimizer spends one and one for each adapter on its first
            simplex.
    """

    name: str = "lorahub"
    mixed: bool = False
    count: int = 20
    rows: int = 20
    budget: int = 40

    @property
    def learns(self) -> bool:
        return True

    def prepare(self, ground: Ground) -> None:
        from tqdm.auto import tqdm

        lessons = ground.lessons(self.name)
        groups = {_ALL: lessons} if self.mixed else {task: lessons.of([task]) for task in lessons.tasks}
        file = ground.folder / f"{self.name}.jsonl"
        known = {one.key: one for one in _read(file)}
        found: dict[str, Search] = {}
        for task, rows in tqdm(groups.items(), desc=self.name, unit="search", disable=not ground.progress):
            adapters, drawn = self._adapters(ground, task), self._rows(ground, task, rows)
            key = self._key(ground, adapters, drawn)
            found[task] = known.get(key) or self._search(ground, task, adapters, drawn, key)
            if key not in known:
                known[key] = found[task]
                _write(file, [*known.values()])
        ground.shared[self._place] = found

    def routings(self, ground: Ground, rows: Sequence[MixedRow]) -> list[Routing | None]:
        found = ground.shared[self._place]
        assert isinstance(found, dict), "prepare has put it there"
        by_task = {task: search.routing(ground.namespace) for task, search in found.items()}
        return [by_task.get(_ALL if self.mixed else row.task) for row in rows]

    @property
    def _place(self) -> str:
        return f"searches of {self.name}"

    def _adapters(self, ground: Ground, task: str) -> list[Adapter]:
        pool = ground.pool()
        order = self._dice(ground, task, "adapters").sample(sorted(pool), len(pool))
        drawn: list[Adapter] = []
        for name in order:
            if len(drawn) < self.count and why_not_plain(ground, pool[name]) is None:
                drawn.append(pool[name])
        if not drawn:
            raise NoAdaptersError(
                f"system {self.name!r}: none of the {len(pool)} adapters in service for {str(ground.base_model)!r} is "
                "a plain LoRA"
            )
        if len(drawn) < self.count:
            _log.warning("%s, %s: %d adapters are all there are, not %d", self.name, task, len(drawn), self.count)
        return drawn

    def _rows(self, ground: Ground, task: str, rows: MixedSet) -> list[MixedRow]:
        return self._dice(ground, task, "rows").sample(rows.rows, min(self.rows, len(rows)))

    def _dice(self, ground: Ground, task: str, what: str) -> random.Random:
        return random.Random(f"{ground.seed} {self.name} {task} {what}")

    def _key(self, ground: Ground, adapters: Sequence[Adapter], rows: Sequence[MixedRow]) -> str:
        told = {
            "adapters": [(one.name, one.digest) for one in adapters],
            "rows": [astuple(row) for row in rows],
            "base_model": adapters[0].base_model,
            "template": ground.template if isinstance(ground.template, str | None) else "a function",
            "settings": None if ground.settings is None else asdict(ground.settings),
            "seed": ground.seed,
            "budget": self.budget,
            "wanted": self.count,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()

    def _search(
        self, ground: Ground, task: str, adapters: Sequence[Adapter], rows: Sequence[MixedRow], key: str
    ) -> Search:
        from lora_hub_sdk.engine.answer_losses import AnswerLosses

        began = perf_counter()
        names = tuple(adapter.name for adapter in adapters)
        measured = AnswerLosses(
            ground.hub,
            [(row.inputs, row.targets) for row in rows],
            names,
            base_model=ground.base_model,
            namespace=ground.namespace,
            template=ground.template,
            settings=ground.settings,
        )

        def objective(weights: Sequence[float]) -> float:
            losses = measured.of(weights, "parameters")
            return sum(losses) / len(losses) + PENALTY * sum(map(abs, weights)) / len(weights)

        seed = self._dice(ground, task, "search").randrange(2**32)
        weights = search_weights(objective, len(names), budget=self.budget, seed=seed)
        if not any(weights):
            _log.warning("%s, %s: no weights better than the base model's were found", self.name, task)
        return Search(
            task,
            key,
            names,
            self.count,
            weights,
            objective(weights),
            objective([0.0] * len(names)),
            self.budget,
            perf_counter() - began,
        )


def search_weights(
    objective: Callable[[Sequence[float]], float], count: int, *, budget: int, seed: int
) -> tuple[float, ...]:
    """The ``count`` weights in [-1.5, 1.5] that nevergrad's NGOpt recommends, from zeros, after ``budget`` trials.

    The same seed and the same objective give the same weights.

    Raises:
        MissingExtraError: nevergrad is not installed.
        As ``objective``.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise MissingExtraError("LoRAHub's search", "evaluation") from error
    import numpy as np

    space = nevergrad.p.Array(init=np.zeros(count), lower=-BOUND, upper=BOUND)
    space.random_state = np.random.RandomState(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    with warnings.catch_warnings():
        # With few trials it takes COBYLA, which tells of all that it mends, and of converging before the last.
        warnings.filterwarnings("ignore", message="COBYLA|Underlying optimizer has already converged")
        try:
            for _ in range(budget):
                candidate = optimizer.ask()
                loss = objective(_weights(candidate))
                optimizer.tell(candidate, loss if math.isfinite(loss) else _WORST)
            return _weights(optimizer.provide_recommendation())
        finally:
            # COBYLA waits for the next loss in a thread that ends with this object, and the interpreter for the thread.
            del optimizer


def _weights(candidate: Any) -> tuple[float, ...]:
    return tuple(map(float, candidate.value))


def _read(file: Path) -> list[Search]:
    """Those of a file, or none where there is no file.

    Raises:
        ConfigurationError: it holds something else.
    """
    if not file.exists():
        return []
    try:
        told = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
        return [Search(**{**one, "adapters": tuple(one["adapters"]), "weights": tuple(one["weights"])}) for one in told]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{str(file)!r} holds no searches ({error!r}); remove it, and they start over"
        ) from error


def _write(file: Path, searches: Sequence[Search]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in searches).encode())
