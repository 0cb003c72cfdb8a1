"""How quickly each strategy answers, by how many rows are answered together (paper figure 4b)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.types import Route, Routing, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.engine.engine import Engine
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedSet

BATCHES: Final = (1, 2, 4, 8, 16, 32)
#: One adapter for all rows, which any server of a single adapter can do. All ratios are to it.
SINGLE: Final = "single"
#: The others: each row is answered by adapters of its own.
STRATEGIES: Final = ("selection", "fusion", "mixture")
#: Where a run's figures look for it.
FILE: Final = "throughput.json"
_STOPS: Final[frozenset[int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Speed:
    """One system at one batch size: medians over the rounds.

    Attributes:
        system: ``SINGLE``, or the strategy.
        batch: rows that are answered together.
        tokens_per_s: new tokens of all rows, over the time from the call to the last of them; prompts are read in it.
        rows_per_s: answers, each of the same number of tokens.
        of_single: times the tokens of ``SINGLE``: of each round, as both of a round met the same noise.
        low, high: the least and the most ``of_single`` of any round.
    """

    system: str
    batch: int
    tokens_per_s: float
    rows_per_s: float
    of_single: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """All systems at all batch sizes. ``settings`` tells what was measured, and on what."""

    settings: Mapping[str, Any]
    speeds: tuple[Speed, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "speeds": [asdict(speed) for speed in self.speeds]}

    def save(self, folder: Path) -> Path:
        """Write it where ``draw_figures`` finds it; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        (target := folder / FILE).write_text(json.dumps(self.as_dict(), indent=1) + "\n", "utf-8")
        return target

    @classmethod
    def load(cls, folder: Path) -> Throughput:
        """Read what ``save`` wrote.

        Raises:
            ConfigurationError: there is no such file, or it holds something else.
        """
        path = folder / FILE
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(found["settings"], tuple(Speed(**speed) for speed in found["speeds"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"throughput {str(path)!r} cannot be read ({error!r}); measure_throughput(...).save(folder) writes it"
            ) from error


def measure_throughput(
    ground: Ground,
    questions: MixedSet,
    *,
    batches: Sequence[int] = BATCHES,
    k: int = 3,
    new_tokens: int = 32,
    rounds: int = 5,
) -> Throughput:
    """Answer questions by each strategy at each batch size, on the hub's own base model.

    No answer ends early: the engine that answers knows no token that ends a text. Systems take turns within each round,
    on the same questions; each round has other questions. Routes are made before, so retrieval is not in the times.

    Args:
        questions: any; as many are drawn by ``ground.seed`` as the largest batch has rows, and more where there are.
        k: adapters of a fusion and of a mixture.
        new_tokens: of every answer.

    Raises:
        ConfigurationError: no questions, or numbers below 1.
        NoAdaptersError: there is no adapter to route to.
    """
    from lora_hub_sdk.engine.engine import Engine

    sizes = tuple(sorted(set(batches)))
    if not questions.rows or not sizes or min(*sizes, k, new_tokens, rounds) < 1:
        raise ConfigurationError(
            f"{len(questions)} questions, batches={list(batches)!r}, k={k}, new_tokens={new_tokens}, rounds={rounds}: "
            "expected one question and 1 or more of each"
        )
    prompts = _prompts(questions, sizes[-1], ground.seed)
    routes = _routes(ground, prompts, k)
    base = ground.hub.engine(ground.base_model, ground.settings).base
    # A second engine on the same model; the hub's own goes on serving answers that end.
    with closing(Engine(replace(base, eos_ids=_STOPS))) as engine:
        run = _Run(engine, prompts, routes, Sampling(new_tokens), ground)
        run.warm_up()
        taken = {size: [run.round(size, number) for number in range(rounds)] for size in sizes}
    settings = {
        "base_model": next((route.base_model for route in routes[SINGLE]), ""),
        "device": base.device.type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "k": k,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    return Throughput(settings, tuple(_speed(name, size, taken[size]) for name in routes for size in sizes))


@dataclass(frozen=True, slots=True)
class _Taken:
    """One call: how long it took, and what came of it."""

    seconds: float
    tokens: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Run:
    engine: Engine
    prompts: Sequence[str]
    routes: Mapping[str, Sequence[Route]]
    sampling: Sampling
    ground: Ground

    def warm_up(self) -> None:
        """Have all adapters in memory, and every kind of pass behind us."""
        for name in self.routes:
            self._answered(name, range(len(self.prompts)), replace(self.sampling, max_new_tokens=2))

    def round(self, size: int, number: int) -> dict[str, _Taken]:
        """Every system once; the first one is another in each round."""
        places = [(number * size + place) % len(self.prompts) for place in range(size)]
        names = [*self.routes]
        turned = names[number % len(names) :] + names[: number % len(names)]
        return {name: self._answered(name, places, self.sampling) for name in turned}

    def _answered(self, name: str, places: Sequence[int], sampling: Sampling) -> _Taken:
        from lora_hub_sdk.engine.request import Request
        from lora_hub_sdk.models.openmp import give_threads_back

        template, routes = self.ground.template, self.routes[name]
        requests = [Request(self.prompts[place], routes[place], sampling, template) for place in places]
        give_threads_back()
        start = perf_counter()
        completions = self.engine.generate(requests)
        seconds = perf_counter() - start
        return _Taken(seconds, sum(one.usage.completion_tokens for one in completions), len(completions))


def _prompts(questions: MixedSet, largest: int, seed: int) -> list[str]:
    """Four largest batches where there are so many questions; repeated where there are too few for one."""
    texts = [row.inputs for row in questions.rows]
    drawn = random.Random(seed).sample(texts, min(len(texts), 4 * largest))
    return (drawn * -(-largest // len(drawn)))[: max(largest, len(drawn))]


def _routes(ground: Ground, prompts: Sequence[str], k: int) -> dict[str, Sequence[Route]]:
    found: dict[str, Sequence[Route]] = {}
    for strategy in STRATEGIES:
        routing = Routing(strategy, k, namespace=ground.namespace)
        found[strategy] = ground.hub.route(prompts, base_model=ground.base_model, routing=routing)
    return {SINGLE: [found["selection"][0]] * len(prompts), **found}


def _speed(name: str, batch: int, rounds: Sequence[Mapping[str, _Taken]]) -> Speed:
    own = [one[name] for one in rounds]
    ratios = [_rate(one[name]) / _rate(one[SINGLE]) for one in rounds]
    return Speed(
        name,
        batch,
        tokens_per_s=median(map(_rate, own)),
        rows_per_s=median(one.rows / one.seconds for one in own),
        of_single=median(ratios),
        low=min(ratios),
        high=max(ratios),
    )


def _rate(taken: _Taken) -> float:
    return taken.tokens / taken.seconds
