"""Encoders of the retriever benchmark, untrained and trained, and their vectors: each is made once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lora_hub_sdk.models import ResolvedModel, resolve_model
from lora_hub_sdk.retriever.encoder import Encoder, SentenceEncoder
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.retriever.trainer import RetrieverTrainer
from lora_hub_sdk.retriever.training_report import REPORT_FILE

Matrix = NDArray[np.float32]

BASELINE: Final = "all-minilm-l6-v2"
OTHERS: Final = ("all-mpnet-base-v2",)
#: Texts between two times that vectors are written: what a killed run may lose.
_PART: Final = 512
#: What of a trainer changes how it runs, not what it makes.
_NO_RECIPE: Final = frozenset({"device", "progress", "endpoint", "token", "offline"})


class KeptEncoder:
    """An encoder whose vectors are kept in a folder, by fingerprint and text: a second run encodes nothing."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        self.name, self.fingerprint = encoder.name, encoder.fingerprint
        self._encoder = encoder
        self._file = folder / f"{encoder.fingerprint[:32]}.npz"
        self._place: dict[bytes, int] = {}
        self._vectors: Matrix | None = None
        if self._file.is_file():
            with np.load(self._file) as kept:
                self._vectors = kept["vectors"]
                self._place = {row.tobytes(): place for place, row in enumerate(kept["texts"])}

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._encoder.dimension if self._vectors is None else self._vectors.shape[1]

    def encode(self, texts: Sequence[str]) -> Matrix:
        """(n, dimension) float32, each row of length 1."""
        wanted = [_digest(text) for text in texts]
        missing = {key: text for key, text in zip(wanted, texts, strict=True) if key not in self._place}
        keys = list(missing)
        for start in range(0, len(keys), _PART):
            part = keys[start : start + _PART]
            if len(keys) > _PART:
                say(f"{self.name}: encoding {start} of {len(keys)} texts")
            self._keep(part, self._encoder.encode([missing[key] for key in part]))
        if self._vectors is None:
            return np.zeros((0, self.dimension), dtype=np.float32)
        return self._vectors[[self._place[key] for key in wanted]]

    def _keep(self, keys: Sequence[bytes], vectors: Matrix) -> None:
        self._vectors = vectors if self._vectors is None else np.concatenate([self._vectors, vectors])
        self._place.update({key: len(self._place) + number for number, key in enumerate(keys)})
        texts = np.frombuffer(b"".join(self._place), dtype=np.uint8).reshape(len(self._place), -1)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, texts=texts, vectors=self._vectors)
        partial.replace(self._file)


class Lab:
    """Makes encoders, and keeps what they cost in a cache folder.

    Args:
        train: whether to train encoders that are not in the cache yet; otherwise they are left out.
        baseline: folder or name of the encoder that is measured untrained, and trained on.
        others: encoders that are measured untrained where they are on this machine.
        recipe: the trainer; its seed is that of each split.
    """

    def __init__(
        self,
        cache: Path,
        *,
        train: bool = True,
        baseline: str = BASELINE,
        others: Sequence[str] = OTHERS,
        recipe: RetrieverTrainer | None = None,
    ) -> None:
        self.cache, self.train, self.baseline, self.others = cache, train, baseline, others
        self.recipe = recipe or RetrieverTrainer(encoder=baseline)
        self._open: dict[str, KeptEncoder] = {}

    def untrained(self, name: str | None = None) -> KeptEncoder:
        """An encoder as it is found; the baseline where no other is named.

        Raises:
            ModelNotFoundError: nobody has it.
        """
        name = name or self.baseline
        if name not in self._open:
            # Nothing is downloaded to compare with.
            resolved = resolve_model(name, offline=name in self.others)
            self._open[name] = KeptEncoder(SentenceEncoder(resolved), self.cache / "vectors")
        return self._open[name]

    def trained(self, tasks: Sequence[Task], seed: int) -> KeptEncoder | None:
        """The baseline trained on all of these tasks, now or in an earlier run; None where it may not be trained."""
        trainer = replace(self.recipe, seed=seed, progress=True)
        folder = self.cache / "trained" / self._key(trainer, tasks)
        if str(folder) not in self._open:
            if not (folder / REPORT_FILE).is_file():
                if not self.train:
                    return None
                say(f"training on {len(tasks)} tasks, seed {seed}, into {folder}")
            trainer.fit_tasks(tasks, output_dir=folder)
            self._open[str(folder)] = KeptEncoder(
                SentenceEncoder(ResolvedModel(folder.name, folder, "path")), self.cache / "vectors"
            )
        return self._open[str(folder)]

    def _key(self, trainer: RetrieverTrainer, tasks: Sequence[Task]) -> str:
        recipe = {name: str(value) for name, value in asdict(trainer).items() if name not in _NO_RECIPE}
        recipe["base"] = self.untrained().fingerprint
        given: list[Any] = [recipe, [(task.name, task.inputs) for task in tasks]]
        return f"{len(tasks)}-tasks-seed-{trainer.seed}-{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]}"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
