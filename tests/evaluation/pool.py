"""A tiny pool with its questions: six adapters of four domains, and a task that no adapter was made for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lora_hub_sdk.evaluation.ground import Ground
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from tests.encoders import Hashing

#: By task: domain, metric, how it asks, and its adapter, if it has one.
TASKS: Final[dict[str, tuple[str, str, str, dict[str, Any] | None]]] = {
    "french": ("translation", "rouge", "Translate {} to French", {"rank": 2, "alpha": 12.0}),
    "german": ("translation", "bleu", "Translate {} to German", {"rank": 6, "alpha": 9.0, "rslora": True}),
    "plural": ("grammar", "em", "The plural of {} is", {"rank": 1, "alpha": 4.0, "modules": (*ATTENTION, *MLP)}),
    "past": ("grammar", "em", "The past tense of {} is", {"rank": 4, "alpha": 20.0, "modules": MLP, "layers": (1,)}),
    "mood": ("sentiment", "em", "Good or bad: {}?", {"rank": 3, "alpha": 9.0, "modules": (*ATTENTION, "lm_head")}),
    "rhyme": ("sound", "f1", "{} rhymes with", {"rank": 5, "alpha": 10.0, "modules": ("o_proj", "gate_proj")}),
    "colour": ("sound", "em", "What colour rhymes with {}?", None),
}
SAMPLED: Final = ("oak", "lamp", "stone", "paper")
LEARNED: Final = ("river", "glass")
ASKED: Final = ("house", "wind")


class Words(Hashing):
    """A text is the sum of its words' random directions, so that texts of one task lie together."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        sums = np.array([super(Words, self).encode(text.lower().split()).sum(0) for text in texts])
        sums = sums.reshape(len(texts), self.dimension)
        unit: NDArray[np.float32] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return unit


@dataclass(frozen=True)
class Pool:
    """A hub with the adapters of ``TASKS``, each named as its task."""

    hub: LoraHub
    base: Path
    #: By name.
    folders: dict[str, Path]
    samples: dict[str, list[str]]
    training: MixedSet
    questions: MixedSet

    @property
    def own(self) -> dict[str, str]:
        return {task: task for task in self.folders}

    def ground(self, folder: Path, **other: Any) -> Ground:
        """Everything that systems need; ``folder`` is where they keep what they learned."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {"hub": self.hub, "base_model": self.base, "own": self.own, "training": self.training, **other}
        return Ground(folder=folder, **values)


def rows_of(words: Sequence[str], tasks: Sequence[str] = tuple(TASKS)) -> MixedSet:
    """Each task asked about each of the words; what is wanted is short."""
    told = [(task, *TASKS[task][:3]) for task in tasks]
    return MixedSet(
        tuple(
            MixedRow(asks.format(word), f"{word[::-1]} {task[0]}", task, domain, metric)
            for word in words
            for task, domain, metric, asks in told
        )
    )


def make_pool(folder: Path, base: Path, encoder: Any = None) -> Pool:
    """Write and register the adapters; ``encoder`` is ``Words`` unless given. The caller closes ``pool.hub``."""
    hub = LoraHub(
        database=folder / "hub.db", index="exact", encoder=encoder or Words("words"), cache_dir=folder / "cache"
    )
    folders, samples = {}, {}
    for seed, (task, (_, _, asks, spec)) in enumerate(TASKS.items()):
        if spec is not None:
            folders[task] = tiny_adapter(folder / task, base, seed=seed, **spec)
            samples[task] = [asks.format(word) for word in SAMPLED]
            hub.register(folders[task], base_model=base, name=task, samples=samples[task])
    return Pool(hub, base, folders, samples, rows_of(LEARNED), rows_of(ASKED))


def add_twin(pool: Pool, name: str, of: str, samples: Sequence[str]) -> None:
    """Register the content of an adapter once more, under another name."""
    folder = pool.folders[of].parent / name
    shutil.copytree(pool.folders[of], folder)
    pool.hub.register(folder, base_model=pool.base, name=name, samples=list(samples))
