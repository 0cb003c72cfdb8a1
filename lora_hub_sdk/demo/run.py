"""``lora-hub demo``: from adapters on a Hub to composed answers and what they are worth, in a few minutes.

A local Hub serves the packaged adapters, so the whole path runs (pull, admit, embed, index, search, compose, generate)
on a machine without a network.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from lora_hub_sdk.demo import DemoAdapter, demo_adapters
from lora_hub_sdk.demo.questions import Question, Questions, draw_questions
from lora_hub_sdk.types import RouteDict, Routing, Sampling

if TYPE_CHECKING:
    from lora_hub_sdk.engine.base_model import DType
    from lora_hub_sdk.hub import LoraHub

#: Compared in this order; the last one is told each prompt's own adapter, which no retriever can beat by much.
PERFECT: Final = "perfect selection"
SYSTEMS: Final[Mapping[str, Routing]] = {
    "base model": Routing("base"),
    "selection": Routing("selection"),
    "mixture, uniform": Routing("mixture"),
    "mixture, similarity": Routing("mixture", weights="similarity"),
    "fusion": Routing("fusion"),
}


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo does.

    Without ``cache_dir`` pulled files lie beside a kept SQLite file, else in the Hub's cache; without ``database``
    everything lies in a temporary folder. ``dtype`` None is ``fastest_dtype()``.
    """

    database: str | None = None
    cache_dir: Path | None = None
    base_model: str = "smollm2-135m-instruct"
    dtype: DType | None = None
    strategy: str = "mixture"
    weights: str = "similarity"
    k: int = 3
    shown: int = 12
    per_task: int = 10
    #: The longest answer of the packaged rows has 47 tokens, its end included.
    max_new_tokens: int = 48
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answered:
    """One shown prompt: what the base model said, what the composed adapters said, and which they were."""

    task: str
    prompt: str
    expected: str
    route: RouteDict
    base_answer: str
    answer: str


@dataclass(frozen=True, slots=True)
class SystemScore:
    """One system over all measured prompts; ``score`` is the mean of the tasks' metrics, in percent."""

    system: str
    score: float
    seconds: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything that the demo found. ``top1`` and ``top3``: how often the task's own adapter was found, in percent."""

    adapters: tuple[str, ...]
    answered: tuple[Answered, ...]
    measured_prompts: int
    systems: tuple[SystemScore, ...]
    top1: float
    top3: float
    dtype: str
    database: str | None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        return asdict(self)


def fastest_dtype() -> DType:
    """bfloat16 where the processor multiplies it, else float32.

    Measured with the demo's batches on a CPU of the first kind: 0.6 of float32's time. One of the second kind emulates
    every product.
    """
    import torch

    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


class Watcher(Protocol):
    """Told how far the demo is."""

    def step(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` parts of ``what`` are finished."""


class _NoWatcher:
    def step(self, what: str, done: int, total: int) -> None:
        pass


def run_demo(
    options: DemoOptions | None = None,
    *,
    adapters: Sequence[DemoAdapter] | None = None,
    watcher: Watcher | None = None,
) -> DemoReport:
    """Publish, register, answer and measure.

    Args:
        adapters: those to use instead of the packaged ones; all of them for one base model.

    Raises:
        MissingExtraError: the "langchain" extra is not installed.
        LoraHubError: as ``LoraHub.register`` and ``LoraHub.generate``.
    """
    import lora_hub_sdk

    lora_hub_sdk.LoraRetrieverLLM  # noqa: B018 (a missing extra shows here, before any work)
    options = options or DemoOptions()
    with ExitStack() as stack:
        return _Demo(options, adapters or demo_adapters(), watcher or _NoWatcher(), stack).run()


class _Demo:
    """One run; everything it opens is closed with ``stack``."""

    def __init__(
        self, options: DemoOptions, adapters: Sequence[DemoAdapter], watcher: Watcher, stack: ExitStack
    ) -> None:
        from lora_hub_sdk.hub import LoraHub
        from lora_hub_sdk.testing import LocalHub

        self._options = options
        self._dtype = options.dtype or fastest_dtype()
        self._adapters = adapters
        self._watcher = watcher
        self._source = stack.enter_context(LocalHub())
        database, cache = _places(options, stack)
        self._hub: LoraHub = stack.enter_context(LoraHub(database, endpoint=self._source.url, cache_dir=cache))
        self._sampling = Sampling(max_new_tokens=options.max_new_tokens)

    def run(self) -> DemoReport:
        options, start = self._options, time.perf_counter()
        self._register()
        registered = time.perf_counter()
        questions = draw_questions(self._adapters, shown=options.shown, per_task=options.per_task, seed=options.seed)
        answered = self._show(questions.shown)
        shown = time.perf_counter()
        systems = self._measure(questions)
        top1, top3 = self._retrieval(questions.measured)
        end = time.perf_counter()
        return DemoReport(
            adapters=tuple(adapter.name for adapter in self._adapters),
            answered=answered,
            measured_prompts=len(questions.measured),
            systems=systems,
            top1=top1,
            top3=top3,
            dtype=self._dtype,
            database=options.database,
            seconds={
                "register": registered - start,
                "answer": shown - registered,
                "measure": end - shown,
                "total": end - start,
            },
        )

    def _register(self) -> None:
        for done, adapter in enumerate(self._adapters, start=1):
            self._source.publish(adapter.repo_id, adapter.folder)
            self._hub.register(
                adapter.repo_id, samples=adapter.samples, name=adapter.name, base_model=self._options.base_model
            )
            self._watcher.step("registering adapters", done, len(self._adapters))

    def _show(self, questions: Sequence[Question]) -> tuple[Answered, ...]:
        from lora_hub_sdk import LoraRetrieverLLM
        from lora_hub_sdk.demo.chain import ask

        options = self._options
        llm = LoraRetrieverLLM(
            hub=self._hub,
            base_model=options.base_model,
            strategy=options.strategy,
            weights=options.weights,
            k=options.k,
            dtype=self._dtype,
            max_new_tokens=options.max_new_tokens,
        )
        prompts = [question.prompt for question in questions]
        self._watcher.step("answering with LangChain", 0, 2)
        composed = ask(llm, prompts)
        self._watcher.step("answering with LangChain", 1, 2)
        plain = ask(llm, prompts, strategy="base")
        self._watcher.step("answering with LangChain", 2, 2)
        return tuple(
            Answered(question.task.name, question.prompt, question.expected, route, base_answer, answer)
            for question, (answer, route), (base_answer, _) in zip(questions, composed, plain, strict=True)
        )

    def _measure(self, questions: Questions) -> tuple[SystemScore, ...]:
        scores = []
        total = len(SYSTEMS) + 1
        self._watcher.step("measuring systems", 0, total)
        for system, routing in SYSTEMS.items():
            scores.append(self._score(system, [(routing, questions.measured)]))
            self._watcher.step("measuring systems", len(scores), total)
        # A pin holds for a whole call, so each task has its own.
        pinned = [
            (Routing("selection", adapters=(adapter.name,)), [q for q in questions.measured if q.task == adapter])
            for adapter in self._adapters
        ]
        scores.append(self._score(PERFECT, pinned))
        self._watcher.step("measuring systems", total, total)
        return tuple(scores)

    def _score(self, system: str, calls: Iterable[tuple[Routing, Sequence[Question]]]) -> SystemScore:
        start = time.perf_counter()
        scores = [
            question.score(answer)
            for routing, questions in calls
            if questions
            for question, answer in zip(questions, self._answers(questions, routing), strict=True)
        ]
        return SystemScore(system, _mean(scores), time.perf_counter() - start)

    def _answers(self, questions: Sequence[Question], routing: Routing) -> list[str]:
        from lora_hub_sdk.engine.base_model import ModelSettings

        completions = self._hub.generate(
            [question.prompt for question in questions],
            base_model=self._options.base_model,
            routing=routing,
            sampling=self._sampling,
            settings=ModelSettings(self._dtype),
        )
        return [completion.text for completion in completions]

    def _retrieval(self, questions: Sequence[Question]) -> tuple[float, float]:
        """Top-1 and top-3 accuracy, in percent."""
        found = self._hub.search_many([question.prompt for question in questions], 3)
        ranked = [[hit.adapter.name for hit in hits] for hits in found]
        pairs = list(zip(questions, ranked, strict=True))
        first = [100.0 * (question.task.name in names[:1]) for question, names in pairs]
        within = [100.0 * (question.task.name in names) for question, names in pairs]
        return _mean(first), _mean(within)


def _places(options: DemoOptions, stack: ExitStack) -> tuple[str, Path | None]:
    """Where the registry and the pulled files live; a kept registry needs its adapters' files to stay, too."""
    database = options.database
    if database is None:
        temporary = tempfile.TemporaryDirectory(prefix="lora-hub-demo-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        return str(folder / "hub.db"), options.cache_dir or folder / "adapters"
    is_file = "://" not in database and database != ":memory:"
    beside = Path(f"{database}.adapters").resolve() if is_file else None
    return database, options.cache_dir or beside


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
