"""Training of the encoder: texts of one task come near to each other, and far from those of other tasks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError
from lora_hub_sdk.models import ResolvedModel, resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder, mean_vector
from lora_hub_sdk.retriever.left_out import leave_one_out
from lora_hub_sdk.retriever.pairs import distinct, plan_steps
from lora_hub_sdk.retriever.settings import INSTRUCTION, RetrieverSettings, write_settings
from lora_hub_sdk.retriever.tasks import Task, TaskSource, read_tasks, split_tasks, task_vectors, tasks_of
from lora_hub_sdk.retriever.training_report import REPORT_FILE, Course, TrainingReport, write_card

if TYPE_CHECKING:
    from numpy.typing import NDArray

Reference = str | os.PathLike[str]
_CHECKPOINTS: Final = "checkpoints"
#: Tells, until the report is written, which training it is and, once that ended, how it went.
_STARTED_FILE: Final = ".training"
#: Where ``steps`` is left to the number of texts.
_FEWEST_STEPS: Final = 60
_MOST_STEPS: Final = 600


@dataclass(frozen=True, kw_only=True)
class RetrieverTrainer:
    """Fine-tunes a sentence encoder on the samples of adapters, by sentence-transformers' own trainer and loss.

    The loss is the paper's (section 4.1) with the -log that its formula lacks: for a text x, another x+ of its task and
    texts x' of p other tasks, -log(exp(s(x, x+) / t) / sum of exp(s(x, x') / t)), s the cosine. The sum goes over all
    pairs that hold x or x+, as for the GTE models (arXiv 2308.03281).

    Attributes:
        encoder: what is trained on: a folder, a Hub id, or the embedded "all-minilm-l6-v2".
        seed: of the split, the pairs and the dropout. On a CPU the same seed gives the same weights, bit by bit, with
            one version of torch and one number of threads.
        instruction: stands in front of every text, in training as in searches.
        steps: how many; None for ``epochs`` over the texts, from 60 to 600 steps.
        epochs: how often each text is seen, where ``steps`` does not say.
        negatives: p, how many other tasks each pair is held against; fewer where there are no more.
        hard: the share of the negatives that is taken from the tasks nearest by the untrained encoder.
        temperature: t, above 0.
        learning_rate: the highest; it rises over the first tenth of the steps and falls to zero.
        max_tokens: what is read of a text in training; searches read as much as the encoder takes.
        validation: the share of the drawn tasks that is held out to stop early by; 0 trains on all of them.
        patience: how many checks without a better one end the training, where ``validation`` is above 0.
        check_every: steps from one checkpoint, and check, to the next.
        precision: "auto" is bfloat16 on a GPU that has it, else float32.
        device: None is a GPU where there is one.
        progress: show a bar on standard error.
        endpoint, token, offline: where the encoder is looked for, as for ``LoraHub``.

    Raises:
        ConfigurationError: a value that makes no sense.
    """

    encoder: Reference = "all-minilm-l6-v2"
    seed: int = 0
    instruction: str = INSTRUCTION
    steps: int | None = None
    epochs: float = 6.0
    negatives: int = 15
    hard: float = 0.5
    temperature: float = 0.05
    learning_rate: float = 5e-5
    max_tokens: int = 128
    validation: float = 0.0
    patience: int = 3
    check_every: int = 20
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    progress: bool = False
    endpoint: str | None = None
    token: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        def check(name: str, expected: str, fits: Callable[[Any], bool], kind: type = float) -> None:
            value: Any = getattr(self, name)
            number = not isinstance(value, bool) and isinstance(value, kind | int)
            if not number or not (-math.inf < value < math.inf and fits(value)):
                raise ConfigurationError(f"{name}={value!r}: expected {expected}")

        for name in ("negatives", "patience", "check_every", "max_tokens"):
            check(name, "a whole number of 1 or more", lambda value: value >= 1, int)
        if self.steps is not None:
            check("steps", "a whole number of 1 or more, or None", lambda value: value >= 1, int)
        check("seed", "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32, int)
        for name in ("epochs", "temperature", "learning_rate"):
            check(name, "a number above 0", lambda value: value > 0)
        check("hard", "a number from 0 to 1", lambda value: 0 <= value <= 1)
        check("validation", "a number from 0 to below 1", lambda value: 0 <= value < 1)
        if self.precision not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigurationError(f"precision={self.precision!r}: expected auto, float32, bfloat16 or float16")

    def fit(
        self, source: TaskSource, *, output_dir: Reference, fraction: float = 1.0, namespace: str | None = None
    ) -> TrainingReport:
        """Train on the samples of the adapters in a hub; see ``fit_tasks``.

        Args:
            source: a ``LoraHub``.
            namespace: only this one's adapters; by default all.
        """
        return self.fit_tasks(tasks_of(source, namespace), output_dir=output_dir, fraction=fraction)

    def fit_jsonl(
        self, path: str | os.PathLike[str], *, output_dir: Reference, fraction: float = 1.0
    ) -> TrainingReport:
        """Train on rows of ``{"task", "domain", "inputs"}``, as ``read_tasks`` takes them; see ``fit_tasks``."""
        return self.fit_tasks(read_tasks(path), output_dir=output_dir, fraction=fraction)

    def fit_tasks(self, tasks: Sequence[Task], *, output_dir: Reference, fraction: float = 1.0) -> TrainingReport:
        """Train on a random ``fraction`` of the tasks and write an ordinary sentence-transformers folder.

        A run that was killed goes on from its last checkpoint when it is called again with the same arguments, and one
        that ended is not repeated.

        Args:
            tasks: at least two of those drawn need texts that no other has. The tasks that are not drawn only measure
                how the encoder does on unseen ones.
            output_dir: a new or empty folder, or that of the same training.

        Raises:
            SamplesError: too few tasks to learn a difference from.
            ConfigurationError: two tasks of one name, a fraction outside of (0, 1], or a folder of something else.
            ModelNotFoundError: nobody has the encoder.
            MissingExtraError: the packages that training needs are not installed.
        """
        if len({task.name for task in tasks}) < len(tasks):
            raise ConfigurationError("two tasks have one name; give all texts of a task together")
        drawn, unseen = split_tasks(tasks, fraction, self.seed)
        trained, held_out = self._hold_out(distinct(drawn))
        if not (importlib.util.find_spec("datasets") and importlib.util.find_spec("accelerate")):
            raise MissingExtraError("RetrieverTrainer", "train")
        start = resolve_model(self.encoder, endpoint=self.endpoint, token=self.token, offline=self.offline)
        before = SentenceEncoder(start, instruction=self.instruction, device=self.device)
        folder = Path(output_dir).absolute()
        digest = self._digest(before.fingerprint, tasks, fraction)
        if _is_finished(folder, digest):
            return TrainingReport.read(folder)
        course = _begin(folder, digest)
        vectors = task_vectors(before, tasks)
        if course is None:
            course = self._train(start.folder, trained, held_out, vectors, folder)
            _note(folder, digest, course)
        # They hold weights, and a fingerprint is of all weights in a folder.
        shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)
        after = SentenceEncoder(ResolvedModel(str(folder), folder, "path"), device=self.device)
        moved = task_vectors(after, tasks)
        known, fresh = [task.name for task in drawn], [task.name for task in unseen]
        report = TrainingReport(
            folder=folder,
            fingerprint=after.fingerprint,
            encoder=start.folder.name if start.source == "path" else start.id,
            trained=tuple(task.name for task in trained),
            held_out=tuple(task.name for task in held_out),
            unseen=tuple(fresh),
            texts=sum(len(task.inputs) for task in trained),
            **asdict(course),
            before=leave_one_out(vectors, known),
            after=leave_one_out(moved, known),
            unseen_before=leave_one_out(vectors, fresh),
            unseen_after=leave_one_out(moved, fresh),
        )
        write_card(report, asdict(self))
        report.write(digest)
        (folder / _STARTED_FILE).unlink(missing_ok=True)
        return report

    def _train(
        self,
        start: Path,
        trained: Sequence[Task],
        held_out: Sequence[Task],
        vectors: Mapping[str, NDArray[np.float32]],
        folder: Path,
    ) -> Course:
        from lora_hub_sdk.retriever._training import run

        planned = plan_steps(
            trained,
            steps=self.steps or self._steps(trained),
            negatives=self.negatives,
            near=_nearest({task.name: vectors[task.name] for task in trained}, 2 * self.negatives),
            hard=self.hard,
            seed=self.seed,
        )
        model, course = run(self, start, planned, trained, held_out, folder / _CHECKPOINTS)
        model.save_pretrained(str(folder), create_model_card=False)
        # Weights are written readable by their owner alone; they get the mode of the files beside them.
        for file in folder.glob("*.safetensors"):
            file.chmod((folder / "config.json").stat().st_mode)
        write_settings(folder, RetrieverSettings(instruction=self.instruction, rerank=True))
        return course

    def _hold_out(self, tasks: list[Task]) -> tuple[list[Task], list[Task]]:
        """Tasks to train on, and those to stop early by; the latter have texts enough to search with."""
        able = [task.name for task in tasks if len(task.inputs) > 1]
        wanted = min(math.ceil(self.validation * len(tasks)), len(able), len(tasks) - 2)
        held = set(random.Random(self.seed).sample(sorted(able), max(0, wanted)))
        return [task for task in tasks if task.name not in held], [task for task in tasks if task.name in held]

    def _steps(self, tasks: Sequence[Task]) -> int:
        texts_a_step = 2 * min(self.negatives + 1, len(tasks))
        wanted = math.ceil(self.epochs * sum(len(task.inputs) for task in tasks) / texts_a_step)
        return min(max(wanted, _FEWEST_STEPS), _MOST_STEPS)

    def _digest(self, start: str, tasks: Sequence[Task], fraction: float) -> str:
        """Of everything that the trained weights depend on."""
        recipe = asdict(self)
        for name in ("encoder", "progress", "endpoint", "token", "offline", "device"):
            del recipe[name]
        told = [start, recipe, fraction, [(task.name, task.inputs) for task in tasks]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _nearest(vectors: Mapping[str, NDArray[np.float32]], count: int) -> dict[str, list[str]]:
    """For each task the names of the nearest others by cosine of the mean vectors, the nearest first."""
    names = list(vectors)
    means = np.stack([mean_vector(vectors[name]) for name in names])
    likeness = means @ means.T
    np.fill_diagonal(likeness, -np.inf)
    order = np.argsort(-likeness, axis=1, kind="stable")[:, : min(count, len(names) - 1)]
    return {name: [names[place] for place in row] for name, row in zip(names, order, strict=True)}


def _is_finished(folder: Path, digest: str) -> bool:
    file = folder / REPORT_FILE
    if not file.is_file():
        return False
    try:
        held = json.loads(file.read_text("utf-8"))["digest"]
    except (ValueError, KeyError, TypeError):
        held = None
    if held != digest:
        raise ConfigurationError(
            f"output_dir {str(folder)!r} holds an encoder of another training; choose another folder, or remove it"
        )
    return True


def _begin(folder: Path, digest: str) -> Course | None:
    """Take the folder for this training, and say how it went where a run ended training, but not its report."""
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / _STARTED_FILE
    if not started.is_file():
        if any(folder.iterdir()):
            raise ConfigurationError(f"output_dir {str(folder)!r} is not empty; choose a new folder")
        _note(folder, digest, None)
        return None
    try:
        held = json.loads(started.read_text("utf-8"))
        mine, course = held["digest"] == digest, held["course"]
    except (ValueError, KeyError, TypeError):
        mine, course = False, None
    if not mine:
        raise ConfigurationError(
            f"output_dir {str(folder)!r} holds another training that was not finished; finish it with the same "
            "arguments, choose another folder, or remove it"
        )
    return None if course is None else Course(**{**course, "losses": tuple(course["losses"])})


def _note(folder: Path, digest: str, course: Course | None) -> None:
    temporary = folder / f"{_STARTED_FILE}-{os.getpid()}"
    temporary.write_text(json.dumps({"digest": digest, "course": course and asdict(course)}), "utf-8")
    os.replace(temporary, folder / _STARTED_FILE)
