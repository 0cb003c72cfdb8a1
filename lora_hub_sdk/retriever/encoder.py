"""From text to a vector: a sentence encoder with the paper's instruction in front."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lora_hub_sdk.models import ResolvedModel, weights_fingerprint
from lora_hub_sdk.registry.index import Vector

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Paper section 4.1: what tells the encoder that tasks are compared, not topics.
INSTRUCTION: Final = "Represent the sentence for similar task retrieval: "
#: No tokenizer of ours makes fewer tokens than one per this many characters of a text; the rest would be cut anyway.
_CHARACTERS_PER_TOKEN: Final = 32


class Encoder(Protocol):
    """Turns texts into vectors of length 1. Thread-safe. ``fingerprint`` names the space that the vectors live in."""

    name: str
    fingerprint: str

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dimension) float32, each row of length 1; (0, dimension) for no texts."""


class SentenceEncoder:
    """A sentence-transformers model; every text is encoded with ``instruction`` in front of it.

    Two encoders have one fingerprint exactly when weights, configuration and instruction are the same. The model itself
    is loaded on first use.
    """

    def __init__(self, resolved: ResolvedModel, *, instruction: str = INSTRUCTION, device: str | None = None) -> None:
        self.name = resolved.id
        self.fingerprint = _fingerprint(resolved.folder, instruction)
        self._folder = resolved.folder
        self._instruction = instruction
        self._device = device
        self._lock = threading.Lock()

    @property
    def dimension(self) -> int:
        return int(self._loaded().get_embedding_dimension())

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        model = self._loaded()
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        room = (model.max_seq_length or 512) * _CHARACTERS_PER_TOKEN
        with self._lock:
            vectors: NDArray[np.float32] = model.encode(
                [self._instruction + text[:room] for text in texts],
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return vectors.astype(np.float32, copy=False)

    def _loaded(self) -> Any:
        with self._lock:
            return self._model

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(self._folder), device=self._device, local_files_only=True)


def _fingerprint(folder: Path, instruction: str) -> str:
    digest = hashlib.sha256(weights_fingerprint(folder).encode())
    for file in sorted([folder / "config.json", folder / "modules.json", folder / "sentence_bert_config.json"]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    for file in sorted(folder.glob("*/config.json")):  # pooling and the like
        digest.update(file.read_bytes())
    digest.update(instruction.encode())
    return digest.hexdigest()


def mean_vector(vectors: NDArray[np.float32]) -> Vector:
    """An adapter's vector: the mean of its samples' vectors of length 1, brought to length 1 again (paper eq. 1).

    The authors' code leaves the mean as it is and calls a dot product cosine; adapters with varied samples, whose mean
    is short, are then found too rarely.
    """
    return unit(vectors.mean(axis=0))


def unit(vector: NDArray[Any]) -> Vector:
    """The vector at length 1, as float32.

    Raises:
        ValueError: it has no direction: zero, NaN or infinity.
    """
    wide = np.asarray(vector, dtype=np.float64)
    length = float(np.linalg.norm(wide))
    if not np.isfinite(length) or length < 1e-12:
        raise ValueError("a vector without direction (zero, NaN or infinite) cannot be searched by cosine")
    return (wide / length).astype(np.float32)
