"""A vector for an adapter that nobody gave samples for: guessed from its text and its weights among known adapters.

A guess finds the adapter's neighbourhood, not the adapter: see benchmarks/guess.py. Samples are better, always.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.registry.tensor_keys import place_of
from lora_hub_sdk.retriever.encoder import Encoder, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Modules compared of each pair of adapters; on real adapters, 16 told as much as all 210.
_MODULES: Final = 16
#: Numbers of one factor; a larger one is not read. Rank 256 of 65,536 features has as many.
_MAX_NUMBERS: Final = 1 << 24
#: Known adapters that are compared by weights; of more, those that the text is nearest to.
_MAX_COMPARED: Final = 256
#: Tags that every adapter has, and that tell nothing of its task.
_PLAIN_TAGS: Final = frozenset(
    {"lora", "peft", "safetensors", "transformers", "adapter", "text-generation", "sft", "trl"}
)


def guess_vector(
    encoder: Encoder,
    *,
    text: str,
    weights: Path | None,
    known: Sequence[tuple[Path, NDArray[np.float32]]],
    source: str,
) -> NDArray[np.float32]:
    """A vector of length 1 near those of the known adapters that this one is like.

    Likeness is the sum of two standard scores over the known adapters: how near the text is to their vectors, and how
    alike the directions are that the weights write to. The guess is the mean of the known vectors, weighted by the
    exponential of that sum, with the text's own vector as one more neighbour.

    Args:
        text: what is said of the adapter, as ``described`` makes it; "" where nothing is.
        weights: its folder with ``adapter_model.safetensors``; None to compare by text alone.
        known: folders and vectors, under the same encoder, of adapters for the same base model whose vectors come from
            samples. Folders whose weights cannot be read, or that share no module, count by text alone.
        source: the adapter's name in errors.

    Raises:
        SamplesError: nothing to guess from: no text, and fewer than two known adapters to compare weights with.
    """
    own = encoder.encode([text])[0] if text.strip() else None
    if not known:
        return _certain(own, source)
    vectors = np.stack([vector for _, vector in known]).astype(np.float64)
    by_text = np.zeros(len(known)) if own is None else _standard(vectors @ own)
    near = np.argsort(-by_text, kind="stable")[:_MAX_COMPARED]
    likeness = np.full(len(known), np.nan)
    if weights is not None and len(known) > 1:
        likeness[near] = weight_likeness(weights, [known[place][0] for place in near])
    if own is None and np.isfinite(likeness).sum() < 2:
        return _certain(None, source)
    shares = np.exp(by_text + _standard(likeness))
    try:
        guess = unit(shares @ vectors)
        return guess if own is None else unit(len(known) * guess + own)
    except ValueError as error:
        raise SamplesError(source, f"no vector could be guessed: {error}; give samples instead") from error


def described(name: str, *texts: str | None, tags: Iterable[str] = ()) -> str:
    """What is said of an adapter, in one text: the words of its name, descriptions, and tags that tell something."""
    words = name.rpartition("/")[2].replace("-", " ").replace("_", " ")
    telling = [tag for tag in tags if ":" not in tag and tag.lower() not in _PLAIN_TAGS]
    parts = (words, *(text or "" for text in texts), ", ".join(telling))
    return "\n".join(stripped for part in parts if (stripped := part.strip()))


def weight_likeness(folder: Path, others: Sequence[Path]) -> NDArray[np.float64]:
    """For each of ``others``, how alike the directions are that its deltas and those of ``folder`` write to.

    (len(others),) in [0, 1]; NaN where no module is shared or the weights cannot be read. At each of up to 16 shared
    modules it is the cosine of D D^T and D'D'^T, mean over the modules. The cosine of the deltas D = B A themselves
    would mostly tell whether two trainings began with the same random A, since A hardly moves from there.
    """
    own = _Factors(folder)
    return np.array([_likeness(own, _Factors(other)) for other in others], dtype=np.float64)


def _likeness(own: _Factors, other: _Factors) -> float:
    # In an order that has nothing to do with the layers: every 14th of 7 modules a layer would be one kind alone.
    shared = sorted(own.modules & other.modules, key=lambda module: hashlib.sha256(module.encode()).digest())
    cosines = [_cosine(own.output(module), other.output(module)) for module in shared[:_MODULES]]
    found = [cosine for cosine in cosines if np.isfinite(cosine)]
    return float(np.mean(found)) if found else float("nan")


@dataclass(frozen=True, slots=True)
class _Output:
    """What D D^T needs of one module's delta D = B A: ``b`` (d_out, r), and ``inner`` = A A^T (r, r)."""

    b: NDArray[np.float64]
    inner: NDArray[np.float64]


def _cosine(one: _Output | None, other: _Output | None) -> float:
    if one is None or other is None or one.b.shape[0] != other.b.shape[0]:
        return float("nan")
    with np.errstate(all="ignore"):
        length = np.sqrt(_product(one, one)) * np.sqrt(_product(other, other))
        return _product(one, other) / length if length > 0 else float("nan")


def _product(one: _Output, other: _Output) -> float:
    """<D D^T, D'D'^T> = tr(K^T G K G') with K = B^T B' and G = A A^T, all of rank size."""
    across = one.b.T @ other.b
    return float(np.sum((one.inner @ across) * (across @ other.inner)))


class _Factors:
    """The factors in one folder, read module by module; none where they cannot be read."""

    def __init__(self, folder: Path) -> None:
        import safetensors

        open_file: Any = safetensors.safe_open  # the extension carries no types
        self.modules: frozenset[str] = frozenset()
        self._outputs: dict[str, _Output | None] = {}
        # Registered adapters were admitted, but their files may be gone or damaged since.
        try:
            self._file = open_file(folder / WEIGHTS_FILE, framework="pt")
        except (safetensors.SafetensorError, OSError):
            return
        sides: dict[str, dict[str, str]] = {}
        for key in list(self._file.keys()):
            with suppress(ValueError):
                module, part = place_of(key)
                sides.setdefault(module, {})[part] = key
        self._keys = {
            module: (found["lora_A.weight"], found["lora_B.weight"])
            for module, found in sides.items()
            if {"lora_A.weight", "lora_B.weight"} <= found.keys()
        }
        self.modules = frozenset(self._keys)

    def output(self, module: str) -> _Output | None:
        """None where the factors are larger than what is read, or do not fit each other."""
        if module not in self._outputs:
            self._outputs[module] = self._read(*self._keys[module])
        return self._outputs[module]

    def _read(self, a_key: str, b_key: str) -> _Output | None:
        a_shape, b_shape = (self._file.get_slice(key).get_shape() for key in (a_key, b_key))
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
            return None
        if max(a_shape[0] * a_shape[1], b_shape[0] * b_shape[1]) > _MAX_NUMBERS:
            return None
        a, b = (self._file.get_tensor(key).double().numpy() for key in (a_key, b_key))
        return _Output(b, a @ a.T)


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard scores; 0 for what is not known, and for all where they do not differ."""
    known = values[np.isfinite(values)]
    spread = known.std() if known.size else 0.0
    return np.nan_to_num((values - known.mean()) / spread) if spread > 0 else np.zeros_like(values)


def _certain(own: NDArray[np.float32] | None, source: str) -> NDArray[np.float32]:
    if own is None:
        raise SamplesError(
            source,
            "there is nothing to guess a vector from: no description, and fewer than two adapters with samples whose "
            "weights it could be compared with; give samples, a dozen prompts do well",
        )
    return unit(own)
