"""Registered adapters under another encoder: their vectors made again, and the registry switched to it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.errors import AdapterNotFoundError, ConfigurationError, ConflictError, EncoderMismatchError
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.registry.follower import Progress
from lora_hub_sdk.registry.index import Vector, is_same
from lora_hub_sdk.registry.records import vector_of
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.source import CARD
from lora_hub_sdk.retriever.active import record_of
from lora_hub_sdk.retriever.encoder import Encoder
from lora_hub_sdk.retriever.guess import described, guess_vector
from lora_hub_sdk.retriever.retriever import embed_samples, given_vector
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    #: By an adapter's name, or by (namespace, name).
    Embeddings = Mapping[str, ArrayLike] | Mapping[tuple[str, str], ArrayLike]

#: Names that an error spells out.
_SHOWN: Final = 20


def switch(
    registry: Registry,
    encoder: Encoder,
    embeddings: Embeddings | None = None,
    progress: Progress | None = None,
) -> int:
    """Give every adapter its vector under an encoder, then make that the registry's; see ``LoraHub.switch_encoder``."""
    store, record = registry.store, record_of(encoder)
    given = _given(registry, encoder, embeddings or {})
    _refuse_lost(registry, store.without_embedding(encoder.fingerprint, retired=True), {each.id for each, _ in given})
    done = 0
    for adapter, vector in given:
        held = store.vector(adapter, encoder.fingerprint)
        if held is None or not is_same(vector_of(held), vector):
            store.add_embedding(adapter, encoder.fingerprint, encoder.name, vector, texts=())
            done += 1
    while True:
        waiting = store.without_embedding(encoder.fingerprint, retired=True)
        _refuse_lost(registry, waiting)
        total = done + len(waiting)
        for _ in embed_again(registry, waiting, encoder):
            done += 1
            if progress is not None:
                progress(done, total)
        try:
            if store.active_encoder() != record:
                store.activate(record)
            return done
        except ConflictError:  # others registered or updated meanwhile, still under the encoder before
            continue


def embed_again(registry: Registry, adapters: Iterable[Adapter], encoder: Encoder) -> Iterator[Adapter]:
    """Give adapters their vectors under an encoder, where something is left to make them from.

    What somebody changes meanwhile is left as it is. Guesses come last, since they go by the others' vectors.

    Yields:
        Each adapter that has its vector now.
    """
    for adapter in sorted(adapters, key=lambda adapter: adapter.origin == "guess"):
        texts = registry.samples(adapter)
        if texts:
            vector = embed_samples(encoder, texts, adapter.name)
        elif adapter.origin == "guess":
            summary = read_card(adapter.folder / CARD).summary
            text = described(adapter.name, adapter.description, summary, tags=adapter.tags)
            vector = guessed(
                registry, encoder, adapter.base_model, adapter.namespace, adapter.folder, text, adapter.name
            )
        else:
            continue
        try:
            registry.store.add_embedding(adapter, encoder.fingerprint, encoder.name, vector, texts)
        except (AdapterNotFoundError, ConflictError):
            continue
        yield adapter


def guessed(
    registry: Registry, encoder: Encoder, base_model: str, namespace: str, folder: Path, text: str, label: str
) -> Vector:
    """A vector for an adapter without samples, by the registry's other adapters; see ``guess_vector``."""
    # Of the same namespace only: a guess must not tell of adapters that its caller may not see.
    others = registry.known(namespace, base_model, encoder.fingerprint)
    known = [(other, vector) for other, vector in others if other != folder]
    return guess_vector(encoder, text=text, weights=folder, known=known, source=label)


def _given(registry: Registry, encoder: Encoder, embeddings: Embeddings) -> list[tuple[Adapter, Vector]]:
    kept = registry.store.with_samples()
    given: list[tuple[Adapter, Vector]] = []
    for place, embedding in embeddings.items():
        namespace, name = (DEFAULT_NAMESPACE, place) if isinstance(place, str) else place
        adapter = registry.get(name, namespace)
        if adapter.id in kept or adapter.origin == "guess":
            raise ConfigurationError(
                f"embeddings: {name!r} needs none, the registry can embed it again; to change what it is found by, use "
                f"hub.update({name!r}, embedding=...) after the switch"
            )
        given.append((adapter, given_vector(embedding, encoder, name)))
    return given


def _refuse_lost(registry: Registry, waiting: Iterable[Adapter], given: Collection[int] = ()) -> None:
    """Refuse where adapters would be lost to every search, since nothing is left to embed them by."""
    kept = registry.store.with_samples()
    names = [
        adapter.name if adapter.namespace == DEFAULT_NAMESPACE else f"{adapter.namespace}/{adapter.name}"
        for adapter in waiting
        if adapter.origin != "guess" and adapter.id not in kept and adapter.id not in given
    ]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise EncoderMismatchError(
            f"{len(names)} adapters cannot be embedded again, as no samples of theirs were kept: "
            f"{', '.join(names[:_SHOWN])}{more}; the registry stays with its encoder. Give their vectors under the new "
            "one by hub.switch_encoder(..., embeddings={name: vector}), or samples by hub.update(name, samples=...), "
            "or remove them; retired ones count too"
        )
