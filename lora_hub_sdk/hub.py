"""LoraHub: the only place where all rooms meet."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lora_hub_sdk.composition.router import Router
from lora_hub_sdk.errors import (
    ConfigurationError,
    EngineClosedError,
    InvalidConfigError,
    SamplesError,
)
from lora_hub_sdk.models import BaseModels, resolve_model
from lora_hub_sdk.registry.adapter_config import AdapterConfig, read_adapter_config
from lora_hub_sdk.registry.admission import ModuleShapes, admit, check_base_model
from lora_hub_sdk.registry.registry import Registry, Verification
from lora_hub_sdk.registry.source import HubSource
from lora_hub_sdk.registry.store import Registration, Vector
from lora_hub_sdk.retriever.encoder import INSTRUCTION, Encoder, SentenceEncoder
from lora_hub_sdk.retriever.retriever import Retriever, embed_samples, given_vector
from lora_hub_sdk.retriever.samples import sample_texts
from lora_hub_sdk.types import (
    DEFAULT_NAMESPACE,
    Adapter,
    Completion,
    Hit,
    Route,
    Routing,
    Sampling,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.engine import Engine, Request
    from lora_hub_sdk.engine.prompt import Overflow, Template

# Inside the class ``list`` is a method.
Adapters = list[Adapter]
Hits = list[Hit]
HitLists = list[list[Hit]]
Routes = list[Route]
Completions = list[Completion]
Sample = str | Mapping[str, Any]


class LoraHub:
    """A registry of adapters, a retriever over it, and the engines that answer with them.

    Thread-safe, and a context manager. Opening is quick: the encoder, the vector index and base models load when they
    are first needed.

    Args:
        database: a SQLite file, ":memory:", or an SQLAlchemy URL. An empty one gets its tables; one of another version
            is refused.
        index: folder of the vector index, or "http://host:port" of a Chroma server; None is beside the database.
        encoder: a folder, a Hub id, the embedded "all-minilm-l6-v2", or any object of the ``Encoder`` protocol.
        instruction: put in front of every text that is embedded (paper section 4.1); part of the fingerprint.
        endpoint: a Hub other than https://huggingface.co.
        token: for private and gated repositories; None takes the one that huggingface_hub finds.
        cache_dir: where pulled adapters are kept; None is huggingface_hub's cache.
        base_folders: Hub ids of base models and the folders that hold them, for machines that shall not download.

    Raises:
        SchemaError: the database is of another version, or no registry.
        ConfigurationError: a URL that cannot be opened.
    """

    def __init__(
        self,
        database: str | os.PathLike[str] = "hub.db",
        *,
        index: str | Path | None = None,
        encoder: str | os.PathLike[str] | Encoder = "all-minilm-l6-v2",
        instruction: str = INSTRUCTION,
        endpoint: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        base_folders: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._token = token
        self._encoder_given = encoder
        self._instruction = instruction
        self._bases = BaseModels(base_folders, endpoint=endpoint, token=token)
        self._source = HubSource(endpoint=endpoint, token=token, cache_dir=cache_dir)
        self._registry = Registry(os.fspath(database), index=index, encoder=lambda: self.encoder.fingerprint)
        self._lock = threading.RLock()
        self._engines: dict[tuple[str, ModelSettings], Engine] = {}
        self._shapes: dict[str, ModuleShapes] = {}
        self._closed = False

    # -- what adapters exist ----------------------------------------------------------------------------------------

    def register(
        self,
        reference: str | os.PathLike[str],
        *,
        samples: Iterable[Sample] | None = None,
        embedding: ArrayLike | None = None,
        revision: str | None = None,
        name: str | None = None,
        base_model: str | os.PathLike[str] | None = None,
        description: str | None = None,
        tags: Iterable[str] = (),
        namespace: str = DEFAULT_NAMESPACE,
    ) -> Adapter:
        """Pull an adapter, check it, embed its samples and make it searchable.

        All of it happens or nothing. Registering the same content again under the same name changes nothing and
        returns what is there; then samples may be left out.

        Args:
            reference: a Hub id ("user/lora-x") or a local folder, whose files must stay where they are.
            samples: some dozen prompts that the adapter is good at: texts, or rows with an ``inputs`` field.
            embedding: instead of samples, the adapter's own vector of the encoder's dimension.
            revision: branch, tag or commit; it is pinned to the 40-hex commit that it names now.
            name: unique within the namespace; the Hub id, or the folder's name, where none is given.
            base_model: the base that the adapter must be for.

        Raises:
            SourceError: the repository could not be pulled.
            AdmissionError: the files, the samples or the embedding were refused.
            NameTakenError: the name belongs to other content.
            ModelNotFoundError: nobody has the configuration of the adapter's base model, against which it is checked.
        """
        label = os.fspath(reference)
        if samples is not None and embedding is not None:
            raise ConfigurationError("register: give samples or an embedding, not both")
        texts = () if samples is None else sample_texts(samples, label)
        pulled = self._source.pull(reference if isinstance(reference, str) else Path(reference), revision)
        config = read_adapter_config(pulled.folder, label)
        base = self._base_of(config, base_model, label)
        admitted = admit(
            pulled.folder,
            source=label,
            shapes=self._shapes_of(base),
            pickle_files=pulled.pickle_files,
        )
        name = name or (pulled.folder.name if pulled.is_local else pulled.repo_id)
        if embedding is None:
            known = self._registry.find_same(name, namespace, admitted.digest, None if samples is None else texts)
            if known is not None:
                return self._registry.keep_files(known, pulled.folder)
            if samples is None:
                raise SamplesError(
                    label, "it is not registered yet and came without samples; give samples=[...] or embedding=..."
                )
        return self._registry.add(
            Registration(
                name=name,
                namespace=namespace,
                pulled=pulled,
                admitted=admitted,
                base_model=base,
                description=description or pulled.description,
                tags=tuple(dict.fromkeys((*pulled.tags, *tags))),
                samples=texts,
                vector=self._vector(texts, embedding, label),
                origin="samples" if embedding is None else "owner",
                encoder=self.encoder.fingerprint,
                encoder_name=self.encoder.name,
            )
        )

    def list(self, *, namespace: str | None = None, base_model: str | os.PathLike[str] | None = None) -> Adapters:
        """All adapters by name, of every namespace and base unless one is given."""
        return self._registry.adapters(namespace, self._base_name(base_model))

    def get(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """The adapter of that name.

        Raises:
            AdapterNotFoundError: with names that look alike.
        """
        return self._registry.get(name, namespace)

    def samples(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """The texts that an adapter was registered with; none where its owner gave a vector."""
        return self._registry.samples(self.get(name, namespace=namespace))

    def remove(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """Forget an adapter, its samples and vectors; its files stay.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        return self._registry.remove(name, namespace)

    def verify(self) -> Verification:
        """Compare the vector index with SQL."""
        return self._registry.verify()

    def reindex(self) -> int:
        """Embed what has no vector under the current encoder, and write the vector index anew; returns its size."""
        for adapter in self._registry.unembedded():
            texts = self._registry.samples(adapter)
            if texts:
                vector = embed_samples(self.encoder, texts, adapter.name)
                self._registry.add_embedding(adapter, self.encoder.name, vector)
        return self._registry.reindex()

    @property
    def digest(self) -> str:
        """Changes whenever a search may answer otherwise: for the keys of caches."""
        return self._registry.digest

    # -- which fit a prompt -------------------------------------------------------------------------------------------

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder of prompts and samples."""
        given = self._encoder_given
        if not isinstance(given, str | os.PathLike):
            return given
        resolved = resolve_model(given, endpoint=self._endpoint, token=self._token)
        return SentenceEncoder(resolved, instruction=self._instruction)

    def search(
        self,
        prompt: str,
        k: int = 3,
        *,
        base_model: str | os.PathLike[str] | None = None,
        exclude: Collection[str] = (),
        namespace: str = DEFAULT_NAMESPACE,
        tags: Collection[str] = (),
    ) -> Hits:
        """The up to k adapters nearest to a prompt, best first; see ``search_many``."""
        return self.search_many([prompt], k, base_model=base_model, exclude=exclude, namespace=namespace, tags=tags)[0]

    def search_many(
        self,
        prompts: Sequence[str],
        k: int = 3,
        *,
        base_model: str | os.PathLike[str] | None = None,
        exclude: Collection[str] = (),
        namespace: str = DEFAULT_NAMESPACE,
        tags: Collection[str] = (),
    ) -> HitLists:
        """For each prompt the up to k nearest adapters, best first; all prompts are encoded in one call.

        Fewer adapters than k give fewer hits, none gives none. Equal scores come in the order of names.

        Raises:
            ConfigurationError: k below 1.
            EmptyPromptError: a prompt without text.
        """
        return Retriever(self._registry, self.encoder).search_many(
            prompts,
            k,
            namespace=namespace,
            base_model=self._base_name(base_model),
            tags=tags,
            exclude=exclude,
        )

    def route(
        self,
        prompts: Sequence[str],
        *,
        base_model: str | os.PathLike[str],
        routing: Routing | None = None,
    ) -> Routes:
        """How each prompt would be answered, without answering.

        Raises:
            UnknownStrategyError, ConfigurationError: options that make no sense.
            NoAdaptersError: there is no adapter to route to; only ``min_score``, or the strategy "base", may leave a
                prompt to the base model.
            AdapterNotFoundError: a pinned adapter is not registered.
            EmptyPromptError: a prompt without text.
        """
        router = Router(self._registry, lambda: self.encoder)
        return router.route(prompts, self._base_name(base_model), routing or Routing())

    # -- how text comes out -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        *,
        base_model: str | os.PathLike[str],
        routing: Routing | None = None,
        sampling: Sampling | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        settings: ModelSettings | None = None,
    ) -> Completions:
        """Route all prompts and answer them in one batch, each with its own adapters.

        Args:
            base_model: a folder, a Hub id, or the embedded "smollm2-135m-instruct".
            routing: which adapters, and how they combine; by default a uniform mixture of the three nearest.
            sampling: how tokens are chosen; by default greedily, at most 128.
            template: see ``engine.prompt.Template``.
            overflow: what happens to a prompt longer than the context: "cut" its front, or "refuse" it.
            settings: how the base model is loaded, the first time it is asked for with these settings.

        Raises:
            As ``route``, ``engine`` and ``Engine.generate``.
        """
        requests = self._requests(prompts, base_model, routing, sampling, template, overflow)
        return self.engine(base_model, settings).generate(requests)

    def stream(
        self,
        prompt: str,
        *,
        base_model: str | os.PathLike[str],
        routing: Routing | None = None,
        sampling: Sampling | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        settings: ModelSettings | None = None,
    ) -> Iterator[str | Completion]:
        """As ``generate`` for one prompt: pieces of text as they become final, then the whole completion."""
        (request,) = self._requests([prompt], base_model, routing, sampling, template, overflow)
        yield from self.engine(base_model, settings).stream(request)

    def engine(self, base_model: str | os.PathLike[str], settings: ModelSettings | None = None) -> Engine:
        """The engine of a base model; loaded on the first call, shared by all later ones with the same settings.

        Raises:
            ModelNotFoundError: no source has the model.
            ConfigurationError: settings that this machine cannot serve.
            EngineClosedError: the hub was closed.
        """
        from lora_hub_sdk.engine.base_model import ModelSettings, load_base_model
        from lora_hub_sdk.engine.engine import Engine

        key = (self._base_name(base_model), settings or ModelSettings())
        with self._lock:
            if self._closed:
                raise EngineClosedError("this hub was closed; open it again")
            if key not in self._engines:
                self._engines[key] = Engine(load_base_model(self._bases.resolve(base_model), key[1]))
            return self._engines[key]

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish the running batches and release models, index and database. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()
        self._registry.close()

    def __enter__(self) -> LoraHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- private ------------------------------------------------------------------------------------------------------

    def _requests(
        self,
        prompts: Sequence[str],
        base_model: str | os.PathLike[str],
        routing: Routing | None,
        sampling: Sampling | None,
        template: Template,
        overflow: Overflow,
    ) -> Sequence[Request]:
        from lora_hub_sdk.engine.engine import Request

        routes = self.route(prompts, base_model=base_model, routing=routing)
        return [
            Request(prompt, route, sampling or Sampling(), template, overflow)
            for prompt, route in zip(prompts, routes, strict=True)
        ]

    @overload
    def _base_name(self, base_model: str | os.PathLike[str]) -> str: ...
    @overload
    def _base_name(self, base_model: str | os.PathLike[str] | None) -> str | None: ...
    def _base_name(self, base_model: str | os.PathLike[str] | None) -> str | None:
        """The canonical name, under which adapters are registered."""
        return None if base_model is None else self._bases.name(base_model, self._registry.base_models)

    def _shapes_of(self, base: str) -> ModuleShapes:
        from lora_hub_sdk.engine.shapes import module_shapes

        if base not in self._shapes:
            self._shapes[base] = module_shapes(self._bases.resolve(base, config_only=True).folder)
        return self._shapes[base]

    def _vector(self, texts: Sequence[str], embedding: ArrayLike | None, label: str) -> Vector:
        if embedding is not None:
            return given_vector(embedding, self.encoder, label)
        return embed_samples(self.encoder, texts, label)

    def _base_of(self, config: AdapterConfig, asked: str | os.PathLike[str] | None, label: str) -> str:
        """The canonical name of an adapter's base, which must be the one asked for."""
        if asked is None:
            if not config.base_model:
                raise InvalidConfigError(label, "its configuration names no base model; give base_model=...")
            return self._bases.name(config.base_model, self._registry.base_models)
        # An absolute path that does not exist here is a folder on the trainer's machine, and says nothing.
        nameless = not config.base_model or (
            Path(config.base_model).is_absolute() and not Path(config.base_model).exists()
        )
        if nameless:
            return self._base_name(asked)
        found = self._bases.name(config.base_model)
        check_base_model(config, self._bases.name(asked, lambda: [found]), found, label)
        return found
