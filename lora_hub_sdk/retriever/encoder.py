"""From text to a vector: a sentence encoder with the paper's instruction in front."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models import ResolvedModel, weights_fingerprint
from lora_hub_sdk.models.loading import LOADING
from lora_hub_sdk.models.openmp import give_threads_back
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.retriever.settings import INSTRUCTION as INSTRUCTION
from lora_hub_sdk.retriever.settings import RetrieverSettings, read_settings
from lora_hub_sdk.retriever.vector_cache import CacheUse, VectorCache, text_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: No tokenizer of ours makes fewer tokens than one per this many characters of a text; the rest would be cut anyway.
_CHARACTERS_PER_TOKEN: Final = 32
#: Texts that run through the model at a time; other threads have their turn between.
_BATCH: Final = 32
#: Tokens of a long word.
_WORD: Final = 8
#: A limit on tokens from here on is a tokenizer's way to say that it knows none.
_ENDLESS: Final = 1 << 24
_LONE_SURROGATES: Final = re.compile("[\ud800-\udfff]")


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
    """A sentence-transformers model; every text is encoded with the instruction in front of it.

    Two encoders have one fingerprint exactly when weights, configuration, instruction, and what is read of a long text
    are the same. The model itself is loaded on first use. A text's vector does not depend on the texts beside it, but
    for rounding: up to 1e-6 in each number. Vectors are kept, so that a text that comes again costs next to nothing.

    Args:
        instruction: in front of every text, instead of the settings' own.
        settings: how the encoder is used, instead of what its folder says.
        cache_bytes: memory for vectors of texts that were encoded before; 0 keeps none.

    Raises:
        ConfigurationError: the settings in the folder are damaged.
    """

    def __init__(
        self,
        resolved: ResolvedModel,
        *,
        instruction: str | None = None,
        device: str | None = None,
        settings: RetrieverSettings | None = None,
        cache_bytes: int = 16 << 20,
    ) -> None:
        self.name = resolved.id
        self.settings = _with_instruction(settings or read_settings(resolved.folder), instruction)
        self.fingerprint = _fingerprint(resolved.folder, self.settings)
        self._folder = resolved.folder
        self._device = device
        self._cache = VectorCache(cache_bytes)
        self._loading = threading.Lock()
        # Whoever holds the turn is the next to run; without it, a thread with many batches would starve all others.
        self._turn = threading.Lock()
        self._running = threading.Lock()

    @property
    def dimension(self) -> int:
        return int(self._loaded().get_embedding_dimension())

    @property
    def cache_use(self) -> CacheUse:
        """How often a text's vector was known already."""
        return self._cache.use

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dimension) float32, each row of length 1; (0, dimension) for no texts.

        Lone surrogates, which no tokenizer takes, are read as U+FFFD.

        Raises:
            ConfigurationError: instruction and ``tail_tokens`` leave no room for the front of a text.
        """
        model = self._loaded()
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        read = [self._readable(text, model.max_seq_length) for text in texts]
        keys = [text_key(text) for text in read]
        vectors = self._cache.find(keys)
        missing = {key: text for key, text in zip(keys, read, strict=True) if key not in vectors}
        # Texts of like length waste no time on padding.
        by_length = sorted(missing, key=lambda key: len(missing[key]))
        for start in range(0, len(by_length), _BATCH):
            batch = by_length[start : start + _BATCH]
            for key, vector in zip(batch, self._run(model, [missing[key] for key in batch]), strict=True):
                self._cache.keep(key, vector)
                vectors[key] = vector
        return np.stack([vectors[key] for key in keys])

    def _run(self, model: Any, texts: list[str]) -> NDArray[np.float32]:
        with self._turn:
            self._running.acquire()
        try:
            vectors: NDArray[np.float32] = model.encode(
                [self._shortened(model, self.settings.instruction + text) for text in texts],
                batch_size=_BATCH,
                convert_to_numpy=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        finally:
            give_threads_back()
            self._running.release()
        return vectors.astype(np.float32, copy=False)

    def _readable(self, text: str, tokens: int) -> str:
        """What the tokenizer shall see of a text; it would take seconds over megabytes."""
        room = tokens * _CHARACTERS_PER_TOKEN
        if self.settings.tail_tokens and len(text) > 2 * room:
            text = text[:room] + text[-room:]
        elif not self.settings.tail_tokens:
            text = text[:room]
        return _LONE_SURROGATES.sub("\ufffd", text)

    def _shortened(self, model: Any, text: str) -> str:
        tail = self.settings.tail_tokens
        return front_and_end(model.tokenizer, text, model.max_seq_length, tail) if tail else text

    def _loaded(self) -> Any:
        with self._loading:
            return self._model

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import SentenceTransformer

        with LOADING:
            model = SentenceTransformer(str(self._folder), device=self._device, local_files_only=True)
        limits = (self.settings.max_tokens, model.max_seq_length)
        # Some tokenizers say 10**30 for "no limit".
        limit = min((limit for limit in limits if limit is not None and limit < _ENDLESS), default=512)
        model.max_seq_length = limit
        marks = model.tokenizer(self.settings.instruction, truncation=False, verbose=False)["input_ids"]
        if len(marks) + self.settings.tail_tokens >= limit:
            raise ConfigurationError(
                f"encoder {self.name!r} reads {limit} tokens; its instruction takes {len(marks)} and tail_tokens "
                f"{self.settings.tail_tokens} of them, which leaves none for the front of a text; shorten the "
                "instruction, or raise max_tokens"
            )
        return model


def front_and_end(tokenizer: Any, text: str, tokens: int, tail: int) -> str:
    """The text itself if a model that reads so many tokens reads it all; else its front and its last ``tail`` tokens.

    Long prompts name what is asked at the front or at the very end, and hold their material between.

    Args:
        tokenizer: a fast tokenizer of transformers.
        tokens: how many are read, the model's own marks among them; more than ``tail`` and these.
    """
    room = tokens - tokenizer.num_special_tokens_to_add()
    coded = tokenizer(text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False)
    places = coded["offset_mapping"]
    if len(places) <= room:
        return text
    words = coded.word_ids()
    front, end = _between_words(words, room - tail, -1), _between_words(words, len(words) - tail, 1)
    return f"{text[: places[front - 1][1]]} {text[places[end][0] :]}"


def _between_words(words: Sequence[int | None], place: int, step: int) -> int:
    """The nearest place, some steps on, where a word ends: half a word is read as another one, of more tokens.

    A language without spaces may be one word throughout, so after some steps it stays where it was.
    """
    for near in range(place, place + step * _WORD, step):
        if 0 < near < len(words) and words[near - 1] != words[near]:
            return near
    return place


def _with_instruction(settings: RetrieverSettings, instruction: str | None) -> RetrieverSettings:
    if instruction is None or instruction == settings.instruction:
        return settings
    # Cosines under another instruction are others.
    return replace(settings, instruction=instruction, min_score=None)


def _fingerprint(folder: Path, settings: RetrieverSettings) -> str:
    digest = hashlib.sha256(weights_fingerprint(folder).encode())
    for file in sorted([folder / "config.json", folder / "modules.json", folder / "sentence_bert_config.json"]):
        digest.update(file.read_bytes() if file.is_file() else b"")
    for file in sorted(folder.glob("*/config.json")):  # pooling and the like
        digest.update(file.read_bytes())
    digest.update(_reach(folder, settings))
    digest.update(settings.instruction.encode())
    return digest.hexdigest()


def _reach(folder: Path, settings: RetrieverSettings) -> bytes:
    """How much of a text is read, where the files that are hashed already do not tell."""
    of_model, of_tokenizer = folder / "sentence_bert_config.json", folder / "tokenizer_config.json"
    own = _number(of_tokenizer, "model_max_length")
    # sentence-transformers 6 leaves it to the tokenizer, whose file is not hashed.
    told = _number(of_model, "max_seq_length") if of_model.is_file() else own
    tokens = min((limit for limit in (told or own, settings.max_tokens) if limit is not None), default=None)
    if settings.tail_tokens == 0 and tokens == told:
        return b""
    return f"\0tokens={tokens} tail={settings.tail_tokens}\0".encode()


def _number(file: Path, field: str) -> int | None:
    try:
        value = json.loads(file.read_text("utf-8")).get(field)
    except (OSError, ValueError, AttributeError):  # what is damaged fails when the model is loaded
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


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
