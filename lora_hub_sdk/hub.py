"""LoraHub: the only place where all rooms meet."""

from __future__ import annotations

import getpass
import os
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakKeyDictionary

from lora_hub_sdk.composition.desk import RoutingDesk
from lora_hub_sdk.composition.router import Router
from lora_hub_sdk.engine.call import Call, all_or_none, check_timeout, places_by_base, run_aside
from lora_hub_sdk.engine.engines import Engines, Making
from lora_hub_sdk.engine.settings import EngineSettings
from lora_hub_sdk.errors import AdapterChangedError, ConfigurationError, LoraHubError
from lora_hub_sdk.intake import AdapterRequest, Intake, Reference, RegisterOutcome
from lora_hub_sdk.messages import Piece, Prompt, text_of
from lora_hub_sdk.models import BaseModels
from lora_hub_sdk.registry.admission import Limits
from lora_hub_sdk.registry.card_samples import card_samples
from lora_hub_sdk.registry.follower import Progress, Verification
from lora_hub_sdk.registry.gc import Freed, collect
from lora_hub_sdk.registry.layout import BaseLayout
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.source import HubSource
from lora_hub_sdk.retriever.active import ActiveEncoder
from lora_hub_sdk.retriever.encoder import Encoder
from lora_hub_sdk.retriever.query import names_of
from lora_hub_sdk.retriever.retriever import Retriever
from lora_hub_sdk.retriever.samples import Sample
from lora_hub_sdk.retriever.switching import embed_again, switch
from lora_hub_sdk.retriever.tasks import Task, tasks_of
from lora_hub_sdk.types import (
    DEFAULT_NAMESPACE,
    Adapter,
    AdapterFilter,
    Completion,
    Event,
    Hit,
    MinScore,
    Route,
    Routing,
    Sampling,
    Score,
    Trust,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from lora_hub_sdk.composition.expert_gate import ExpertGate
    from lora_hub_sdk.composition.export import Exported
    from lora_hub_sdk.composition.ramole import Ramole
    from lora_hub_sdk.composition.weight_fitting import WeightFit
    from lora_hub_sdk.composition.weighting import WeightRule
    from lora_hub_sdk.engine.adapter_file import Unverified
    from lora_hub_sdk.engine.base_model import ModelSettings
    from lora_hub_sdk.engine.engine import Engine
    from lora_hub_sdk.engine.expert_training import ExpertReport
    from lora_hub_sdk.engine.gate_training import GateReport, GateRows
    from lora_hub_sdk.engine.metrics import EngineStats
    from lora_hub_sdk.engine.prompt import Overflow, Template
    from lora_hub_sdk.registry.api_keys import ApiKeys
    from lora_hub_sdk.registry.discovery import Candidate
    from lora_hub_sdk.registry.inspection import Inspection
    from lora_hub_sdk.retriever.calibration import Calibration
    from lora_hub_sdk.retriever.evaluation import Evaluation
    from lora_hub_sdk.retriever.questions import Question
    from lora_hub_sdk.retriever.switching import Embeddings
    from lora_hub_sdk.retriever.training_report import TrainingReport

# Inside the class ``list`` is a method.
Adapters = list[Adapter]
Candidates = list["Candidate"]
Completions = list[Completion]
Counts = list[int]
Events = list[Event]
Hits = list[Hit]
HitLists = list[list[Hit]]
Names = list[str]
Outcomes = list[RegisterOutcome]
Routes = list[Route]
Scores = list[Score]
Stats = list["EngineStats"]


class LoraHub:
    """A registry of adapters, a retriever over it, and the engines that answer with them.

    Thread-safe, and a context manager. Opening is quick: the encoder, the vector index and base models load when they
    are first needed.

    Args:
        database: a SQLite file, ":memory:", or an SQLAlchemy URL. An empty one gets its tables; one of another version
            is refused.
        index: folder of an embedded Chroma, "http://host:port" of a Chroma server, or "exact" for an index in memory
            that is filled from SQL; None is a folder beside the database. While one process has a folder open, others
            search exactly and in memory.
        encoder: None is the registry's own, whichever it is at the moment: it was recorded at the first registration,
            and ``switch_encoder`` replaces it; a new registry takes the embedded "all-minilm-l6-v2". A folder, a Hub id
            or any object of the ``Encoder`` protocol is this hub's alone and stays.
        instruction: put in front of every text that is embedded (paper section 4.1); part of the fingerprint. None is
            what the encoder's folder says, or the paper's. Without an encoder, it goes with the embedded one.
        endpoint: a Hub other than https://huggingface.co.
        token: for private and gated repositories; None takes the one that huggingface_hub finds.
        cache_dir: where pulled adapters are kept; None is huggingface_hub's cache.
        base_folders: Hub ids of base models and the folders that hold them, for machines that shall not download.
        limits: bounds on sizes, ranks and norms that no adapter may pass.
        offline: ask no Hub; what was pulled before can be registered and used.
        actor: who is written into the events; the user of this process where nobody is named.
        rerank: whether searches put the 50 nearest adapters in order by their samples' words too; None is what the
            encoder's settings say: yes for those that ``train_retriever`` made, no for others.
        engines: how much each engine may hold and run at once, and how much memory all base models may take.

    Raises:
        SchemaError: the database is of another version, or no registry.
        ConfigurationError: a URL that cannot be opened.
    """

    def __init__(
        self,
        database: Reference = "hub.db",
        *,
        index: str | Path | None = None,
        encoder: Reference | Encoder | None = None,
        instruction: str | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        base_folders: Mapping[str, Reference] | None = None,
        limits: Limits | None = None,
        offline: bool = False,
        actor: str | None = None,
        rerank: bool | None = None,
        engines: EngineSettings | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._endpoint = endpoint
        self._token = token
        self._offline = offline
        self._bases = BaseModels(base_folders, endpoint=endpoint, token=token, offline=offline)
        self._registry = Registry(
            os.fspath(database), index=index, encoder=lambda: self.encoder.fingerprint, actor=actor or _user()
        )
        self._encoder = ActiveEncoder(
            self._registry.store, encoder, instruction=instruction, endpoint=endpoint, token=token, offline=offline
        )
        self._retriever = Retriever(self._registry, lambda: self.encoder, rerank=rerank)
        self._source = HubSource(
            endpoint=endpoint,
            token=token,
            cache_dir=cache_dir,
            limits=limits,
            offline=offline,
            note_pull=self._registry.store.note_pull,
        )
        self._intake = Intake(
            self._registry,
            self._source,
            self._bases,
            encoder=lambda: self.encoder,
            layouts=self._layout_of,
            limits=limits or Limits(),
            card_samples=lambda pulled: card_samples(
                pulled.folder,
                endpoint=endpoint,
                token=token,
                offline=offline,
                owner=None if pulled.is_local else pulled.repo_id.partition("/")[0],
            ),
        )
        #: By canonical name of the base model, then by strategy.
        self._gates: dict[str, dict[str, Ramole | ExpertGate]] = {}
        self._router = Router(self._registry, self._retriever, lambda base: self._gates.get(base, {}))
        self._desk = RoutingDesk(self._routed)
        #: What base models were called by callers who asked for them, by their canonical names.
        self._called: dict[str, Reference] = {}
        self._engine_settings = engines or EngineSettings()
        self._engines = Engines(self._engine_settings.base_bytes)
        #: Every engine that is still somewhere, by the canonical name of its base model.
        self._made: WeakKeyDictionary[Engine, str] = WeakKeyDictionary()
        #: Digests of the contents that engines read.
        self._read: set[str] = set()
        self._layouts: dict[str, BaseLayout] = {}
        self._contexts: dict[str, int] = {}
        self._closed = False

    # -- what adapters exist ----------------------------------------------------------------------------------------

    def register(
        self,
        reference: Reference,
        *,
        samples: Iterable[Sample] | os.PathLike[str] | None = None,
        embedding: ArrayLike | None = None,
        revision: str | None = None,
        name: str | None = None,
        base_model: Reference | None = None,
        description: str | None = None,
        tags: Iterable[str] = (),
        namespace: str = DEFAULT_NAMESPACE,
        keep_samples: bool = True,
        redact: Callable[[str], str] | None = None,
    ) -> Adapter:
        """Pull an adapter, check it, embed its samples and make it searchable.

        All of it happens or nothing. Registering the same content again under the same name changes nothing and
        returns what is there; then samples may be left out.

        Without samples and embedding, examples are looked for in the adapter's card and in the datasets that it names;
        where there are none, its vector is guessed from its weights and its card's text. Every hit tells by ``trust``.

        Args:
            reference: a Hub id ("user/lora-x") or a local folder, whose files must stay where they are.
            samples: some dozen prompts that the adapter is good at: texts, rows with an ``inputs`` field, or a path to
                a file of JSON lines or (.txt) plain lines.
            embedding: instead of samples, the adapter's own vector of the encoder's dimension, so that private samples
                never leave their owner (the paper's first limitation).
            revision: branch, tag or commit; it is pinned to the 40-hex commit that it names now.
            name: unique within the namespace; the Hub id, or the folder's name, where none is given.
            base_model: the base that the adapter must be for.
            namespace: who may find it; a search sees one namespace only.
            keep_samples: False drops the texts once they are embedded; another encoder will then need them again.
            redact: called on each sample's text before anything else sees it.

        Raises:
            SourceError: the repository could not be pulled.
            AdmissionError: the files, the samples or the embedding were refused.
            NameTakenError: the name belongs to other content.
            ModelNotFoundError: nobody has the configuration of the adapter's base model, against which it is checked.
        """
        request = AdapterRequest(
            reference,
            samples=samples,
            embedding=embedding,
            revision=revision,
            name=name,
            base_model=base_model,
            description=description,
            tags=tags,
            namespace=namespace,
            keep_samples=keep_samples,
            redact=redact,
        )
        return self._intake.register(request)

    def register_many(
        self,
        requests: Iterable[Reference | Mapping[str, Any] | AdapterRequest],
        *,
        workers: int = 8,
        progress: bool = False,
        on_done: Callable[[RegisterOutcome], None] | None = None,
    ) -> Outcomes:
        """Register many adapters in parallel; one that fails stops no other.

        Interrupted or failed runs are resumed by calling it again: what is registered changes nothing, and what was
        downloaded is not downloaded again.

        Args:
            requests: references, or objects with a ``reference`` and any other argument of ``register``.
            workers: how many are pulled and checked at a time.
            progress: show a progress bar on standard error.
            on_done: called as each one ends, in the order in which they end and by one thread at a time.

        Returns:
            One outcome for each request, in their order: its adapter, or the error that kept it out.

        Raises:
            ConfigurationError: workers below 1.
        """
        if workers < 1:
            raise ConfigurationError(f"workers={workers}: expected 1 or more")
        from tqdm.auto import tqdm

        given, turn = list(requests), threading.Lock()
        with tqdm(total=len(given), desc="registering", unit="adapter", disable=not progress) as bar:

            def done(outcome: RegisterOutcome) -> None:
                with turn:
                    bar.update()
                    if on_done is not None:
                        on_done(outcome)

            return self._intake.register_many(given, workers=workers, on_done=done)

    def update(
        self,
        name: str,
        *,
        revision: str | None = None,
        samples: Iterable[Sample] | os.PathLike[str] | None = None,
        embedding: ArrayLike | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep_samples: bool = True,
        redact: Callable[[str], str] | None = None,
    ) -> Adapter:
        """Move an adapter to a newer revision, or give it other samples.

        The old revision serves until the new one is pulled, checked and embedded; then one transaction switches. An
        answer that was routed before is finished with the old one. Nothing changes where there is nothing newer.

        Args:
            revision: branch, tag or commit; by default what it was registered from: its branch, or main, or its folder
                as it is now.
            samples, embedding, keep_samples, redact: as for ``register``; by default samples and vector stay.

        Raises:
            AdapterNotFoundError: there is none of that name.
            PinnedError: it is held at its revision.
            ConflictError: somebody else changed it meanwhile; nothing was written.
            As ``register``; the old revision goes on serving.
        """
        known = self.get(name, namespace=namespace)
        request = AdapterRequest(
            known.repo_id,
            samples=samples,
            embedding=embedding,
            revision=revision,
            namespace=namespace,
            keep_samples=keep_samples,
            redact=redact,
        )
        updated = self._intake.update(known, request)
        self._forget_unregistered({known.digest})
        return updated

    def pin(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """Hold an adapter at its present revision: ``update`` refuses to move it until ``unpin``."""
        return self._registry.set_pinned(name, namespace, True)

    def unpin(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """Let ``update`` move an adapter again."""
        return self._registry.set_pinned(name, namespace, False)

    def retire(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """Take an adapter out of service: it is kept with its files, and neither found nor used."""
        return self._registry.set_state(name, namespace, "retired")

    def restore(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """Bring a retired adapter back into service."""
        return self._registry.set_state(name, namespace, "active")

    def gc(self, *, dry_run: bool = False) -> Freed:
        """Free the files of revisions that no adapter has any more, and what broken downloads left.

        This hub's engines forget such revisions too, also those that other processes removed.

        Only what this registry itself put into huggingface_hub's cache on this machine is touched; local folders never.

        Args:
            dry_run: only tell what would be freed.
        """
        freed = collect(self._registry.store, dry_run=dry_run)
        if not dry_run:
            self._forget_unregistered(self._read)
        return freed

    def discover(
        self, base_model: Reference, query: str | None = None, *, limit: int = 20, include_refused: bool = False
    ) -> Candidates:
        """Adapters of a base model on the Hub, each verified by its configuration; nothing is registered.

        Args:
            query: words that the repository's name must contain.
            limit: how many.
            include_refused: also those that could not be registered, with the ``problem`` told.

        Raises:
            ConfigurationError: a base model that is a folder, or a limit below 1.
            SourceError: the Hub cannot be asked.
        """
        from lora_hub_sdk.registry.discovery import discover

        return discover(
            self._base_name(base_model),
            query,
            limit,
            include_refused=include_refused,
            endpoint=self._endpoint,
            token=self._token,
            offline=self._offline,
        )

    def inspect(
        self, reference: Reference, *, revision: str | None = None, base_model: Reference | None = None
    ) -> Inspection:
        """Check an adapter as ``register`` would, and report instead of registering.

        Raises:
            SourceError: the repository could not be pulled.
            ModelNotFoundError: nobody has the configuration of its base model.
            BaseModelMismatchError: it is for another base model than the one asked for.
        """
        return self._intake.inspect(reference, revision, base_model)

    def record_score(
        self, name: str, task: str, metric: str, value: float, *, namespace: str = DEFAULT_NAMESPACE
    ) -> Adapter:
        """Keep how an adapter's present content did at a task; measured again, the score is replaced.

        Raises:
            AdapterNotFoundError: there is none of that name.
            ConfigurationError: no name for task or metric, or a value that is no finite number.
        """
        adapter = self.get(name, namespace=namespace)
        self._registry.record_score(adapter, task, metric, value)
        return adapter

    def scores(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Scores:
        """Every score of an adapter, those of its present content first."""
        return self._registry.scores(self.get(name, namespace=namespace))

    def events(self, name: str | None = None, *, namespace: str | None = None, limit: int = 100) -> Events:
        """Who registered, updated, retired or removed what, and when; the latest first."""
        return self._registry.events(name, namespace, limit)

    def namespaces(self) -> Names:
        """Every namespace that something was registered in."""
        return self._registry.namespaces()

    def list(self, *, namespace: str | None = None, base_model: Reference | None = None) -> Adapters:
        """All adapters by name, retired ones too, of every namespace and base unless one is given."""
        return self._registry.adapters(namespace, self._base_name(base_model))

    def get(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """The adapter of that name, retired or not.

        Raises:
            AdapterNotFoundError: with names that look alike.
        """
        return self._registry.get(name, namespace)

    def samples(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> tuple[str, ...]:
        """The texts that were kept of an adapter; none where its owner gave a vector."""
        return self._registry.samples(self.get(name, namespace=namespace))

    def remove(self, name: str, *, namespace: str = DEFAULT_NAMESPACE) -> Adapter:
        """Forget an adapter, its samples, vectors and scores; its files stay until ``gc``.

        Raises:
            AdapterNotFoundError: there is none of that name.
        """
        removed = self._registry.remove(name, namespace)
        self._forget_unregistered({removed.digest})
        return removed

    def verify(self) -> Verification:
        """Prove that the vector index holds exactly SQL's vectors: every key and every vector is compared."""
        return self._registry.verify()

    def reindex(self, progress: Progress | None = None) -> int:
        """Embed what has no vector under the current encoder, and write the vector index anew; returns its size.

        Args:
            progress: called with how many vectors are in the index, and how many there will be.
        """
        encoder = self.encoder
        for _ in embed_again(self._registry, self._registry.store.without_embedding(encoder.fingerprint), encoder):
            pass
        return self._registry.reindex(progress)

    def switch_encoder(
        self,
        encoder: Reference | Encoder,
        *,
        instruction: str | None = None,
        embeddings: Embeddings | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Have this registry searched with another encoder, from the next search on and in every process.

        Every adapter is embedded, retired ones too, while searches go on with the encoder before; then one transaction
        switches. Killed before that, it goes on where it was when it is called again. The vectors of the encoder before
        stay, so switching back is quick. Hubs that were opened without an encoder follow, as does this one.

        Args:
            encoder: a folder, a Hub id or the embedded "all-minilm-l6-v2", which every process must be able to load; an
                ``Encoder`` object serves this hub, and those that are opened with it.
            instruction: put in front of every text; None is what the encoder's folder says, or the paper's.
            embeddings: vectors under the new encoder of adapters whose samples were not kept, by name, or by
                (namespace, name).
            progress: called with how many adapters are embedded, and how many there will be.

        Returns:
            How many adapters were embedded.

        Raises:
            EncoderMismatchError: adapters that nothing is left to embed by; it names them, and nothing was switched.
            ModelNotFoundError: no source has the encoder.
            SamplesError: a vector in ``embeddings`` that cannot be searched.
        """
        chosen = self._encoder.load(encoder, instruction)
        count = switch(self._registry, chosen, embeddings, progress)
        self._encoder.follow(chosen)
        return count

    @property
    def keys(self) -> ApiKeys:
        """The API keys with which a server's callers come, each bound to one namespace."""
        return self._registry.keys

    @property
    def digest(self) -> str:
        """Changes whenever a search may answer otherwise: for the keys of caches."""
        return f"{self._registry.digest}:{'words' if self._retriever.reranks else 'cosine'}"

    # -- which fit a prompt -------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """The encoder of prompts and samples: this hub's own, or the registry's, whichever that is at the moment.

        Raises:
            ModelNotFoundError: no source has it.
            EncoderMismatchError: the registry's is an object that only others have, or its files changed.
        """
        return self._encoder.current()

    def search(
        self,
        prompt: str,
        k: int = 3,
        *,
        base_model: Reference | None = None,
        exclude: Collection[str] = (),
        namespace: str = DEFAULT_NAMESPACE,
        tags: Collection[str] = (),
        licenses: Collection[str] = (),
        scores: Collection[MinScore] = (),
        min_trust: Trust = "low",
        rerank: bool | None = None,
    ) -> Hits:
        """The up to k adapters nearest to a prompt, best first; see ``search_many``."""
        return self.search_many(
            [prompt],
            k,
            base_model=base_model,
            exclude=exclude,
            namespace=namespace,
            tags=tags,
            licenses=licenses,
            scores=scores,
            min_trust=min_trust,
            rerank=rerank,
        )[0]

    def search_many(
        self,
        prompts: Sequence[str],
        k: int = 3,
        *,
        base_model: Reference | None = None,
        exclude: Collection[str] = (),
        namespace: str = DEFAULT_NAMESPACE,
        tags: Collection[str] = (),
        licenses: Collection[str] = (),
        scores: Collection[MinScore] = (),
        min_trust: Trust = "low",
        rerank: bool | None = None,
    ) -> HitLists:
        """For each prompt the up to k nearest adapters, best first; all prompts are encoded in one call.

        Fewer adapters than k give fewer hits, none gives none. Equal scores come in the order of names. What any
        process committed before the call is seen.

        Args:
            exclude: names never to return.
            namespace: only this one's adapters.
            tags: only adapters that carry all of these.
            licenses: only adapters under one of these, as their cards name them.
            scores: only adapters that reached all of these, by ``record_score``.
            min_trust: "high" leaves out vectors from cards and guesses, "medium" guesses.
            rerank: whether the 50 nearest come in the order of their words too, told by ``relevance``; None is what the
                hub was opened with. Their scores stay cosines.

        Raises:
            ConfigurationError: k below 1, or rerank is no bool.
            EmptyPromptError: a prompt without text.
        """
        allowed = AdapterFilter(
            namespace,
            self._base_name(base_model),
            tags=names_of("tags", tags),
            licenses=names_of("licenses", licenses),
            exclude=names_of("exclude", exclude),
            scores=tuple(scores),
            min_trust=min_trust,
        )
        return self._retriever.search_many(prompts, k, allowed, rerank)

    def route(
        self,
        prompts: Sequence[Prompt],
        *,
        base_model: Reference | None = None,
        routing: Routing | Sequence[Routing] | None = None,
    ) -> Routes:
        """How each prompt would be answered, without answering; ``routing`` is one for all prompts, or one for each.

        Without a base model, each prompt takes the one of its nearest adapter among all of ``Routing.bases`` (those
        below ``min_score`` come last), and its route is made of adapters for that base alone.

        Raises:
            UnknownStrategyError, ConfigurationError: options that make no sense.
            NoAdaptersError: there is no adapter to route to; only ``min_score``, or the strategy "base", may leave a
                prompt to the base model.
            AdapterNotFoundError: a pinned adapter is not registered.
            EmptyPromptError: a prompt without text.
        """
        return self._routes(Call.of(prompts, base_model, routing))

    def export(
        self,
        route: Route | Mapping[str, float],
        path: Reference,
        *,
        rank: int | None = None,
        dtype: str | None = None,
        strategy: str = "mixture",
        namespace: str = DEFAULT_NAMESPACE,
        settings: ModelSettings | None = None,
    ) -> Exported:
        """Save what a route's adapters do together as one standard PEFT adapter, for PEFT, vLLM or LoRAX.

        It answers as the route does: exactly, by its members' ranks side by side, or cut to ``rank``, with the error
        told. PiSSA and OLoRA members become plain LoRA for it. An adapter alone that no LoRA equals (DoRA,
        modules_to_save) is copied. The base model is loaded only for these variants.

        Args:
            route: of ``hub.route`` or of a completion's trace; or adapters' names and weights.
            path: a new or empty folder; it appears as a whole or not at all.
            rank: the largest rank of the result; None for the exact one, whose rank is the sum of its members'.
            dtype: "float32" unless "bfloat16" or "float16" is given; rounding counts in the error.
            strategy: how named adapters combine, "mixture" or "fusion".
            namespace: where names are looked up.
            settings: how the base model is loaded where that is needed.

        Raises:
            UnsupportedRouteError: no one adapter does what the route does: a gate weighs each token, DoRA (without a
                rank) or modules_to_save beside others, or there is no adapter in it.
            ConfigurationError: a rank, dtype or strategy that cannot be, or a path that holds something.
            AdapterNotFoundError, RetiredError: of a name.
            AdapterChangedError: files that are no longer what was registered.
        """
        from lora_hub_sdk.composition.export import export_route, weighed_route
        from lora_hub_sdk.engine.for_export import BaseForExport

        if not isinstance(route, Route):
            route = weighed_route(route, partial(self._registry.in_service, namespace=namespace), strategy)
        return export_route(
            route,
            path,
            layout=self._layout_of,
            read=self._proven,
            base=lambda name: BaseForExport(self.engine(name, settings).base),
            rank=rank,
            dtype=dtype,
        )

    def train_retriever(
        self,
        *,
        output_dir: Reference,
        fraction: float = 1.0,
        namespace: str | None = None,
        **recipe: Any,
    ) -> TrainingReport:
        """Train an encoder on the samples of the adapters in service; ``switch_encoder`` then searches with it.

        Args:
            output_dir: a new folder, which becomes an ordinary sentence-transformers model.
            fraction: the share of the adapters that is trained on; the others measure how it does on unseen ones.
            namespace: only this one's adapters; by default all.
            recipe: what ``RetrieverTrainer`` is made with: encoder, seed, steps and so on.

        Raises:
            SamplesError: fewer than two adapters with samples of their own that were kept.
            ConfigurationError: a setting that makes no sense, or a folder that holds something else.
            MissingExtraError: the packages that training needs are not installed.
        """
        from lora_hub_sdk.retriever.trainer import RetrieverTrainer

        reached = {"endpoint": self._endpoint, "token": self._token, "offline": self._offline}
        trainer = RetrieverTrainer(**{**reached, **recipe})
        return trainer.fit(self, output_dir=output_dir, fraction=fraction, namespace=namespace)

    def calibrate(
        self,
        *,
        false_abstain: float = 0.05,
        namespace: str = DEFAULT_NAMESPACE,
        trained: Iterable[str] = (),
        seed: int = 0,
    ) -> Calibration:
        """Find from which score on an adapter fits, and keep it for ``min_score="auto"``.

        It holds for one namespace and the current encoder, in every process, until it is calibrated again: after many
        adapters came or went, and after the encoder was switched. All kept samples are embedded for it.

        Args:
            false_abstain: the share of fitting prompts that may be left to the base model.
            trained: names of adapters whose samples the encoder was trained on.
            seed: of the draws in a large registry.

        Raises:
            SamplesError: no adapter in service has samples that were kept.
            ConfigurationError: a share that is not between 0 and 1.
        """
        from lora_hub_sdk.retriever.calibration import calibrate_encoder

        encoder = self.encoder
        tasks = tasks_of(self, namespace)
        active = sum(adapter.state == "active" for adapter in self.list(namespace=namespace))
        found = calibrate_encoder(
            encoder,
            tasks,
            false_abstain=false_abstain,
            trained=frozenset(names_of("trained", trained)),
            skipped=active - len(tasks),
            seed=seed,
        )
        self._registry.keep_rule("fit-rule", namespace, encoder.fingerprint, found.rule.as_text())
        return found

    def fit_weights(
        self,
        *,
        k: int = 3,
        questions: Sequence[Question] = (),
        namespace: str = DEFAULT_NAMESPACE,
        trained: Iterable[str] = (),
        rerank: bool | None = None,
        seed: int = 0,
    ) -> WeightFit:
        """Learn from the kept samples how hits are weighed, and keep it for ``weights="fitted"``, "sparse" and "gate".

        Each sample searches, left out of its adapter, and the weights that this adapter gets are made as likely as
        they can be. It holds for one namespace and the current encoder, in every process, until it is done again:
        after many adapters came or went, and after the encoder was switched.

        Args:
            k: how many adapters a route will have; others work too.
            questions: prompts to search with too, each with the name of the adapter that is right for it; those of one
                text may name several.
            trained: names of adapters whose samples the encoder was trained on.
            rerank: whether routes will be reranked by their words; by default as in searches.
            seed: of the folds, the bootstrap, and the draws in a large registry.

        Raises:
            SamplesError: no two adapters for one base model have samples that were kept.
            ConfigurationError: a k below 1, or a question for an adapter without kept samples.
        """
        from lora_hub_sdk.composition.weight_fitting import fit_weights_encoder

        encoder = self.encoder
        found = fit_weights_encoder(
            encoder,
            tasks_of(self, namespace),
            {one.name: one for one in self.list(namespace=namespace) if one.state == "active"},
            k=k,
            questions=questions,
            rerank=self._retriever.reranks if rerank is None else rerank,
            trained=frozenset(names_of("trained", trained)),
            seed=seed,
        )
        self._registry.keep_rule("weights", namespace, encoder.fingerprint, found.rule.as_text())
        return found

    def weight_rule(self, namespace: str = DEFAULT_NAMESPACE) -> WeightRule | None:
        """What ``fit_weights`` found for a namespace and the current encoder, in whichever process; None: nothing."""
        from lora_hub_sdk.composition.weighting import WeightRule

        kept = self._registry.rule("weights", namespace, self.encoder.fingerprint)
        return None if kept is None else WeightRule.of_text(kept)

    def evaluate_retriever(
        self,
        questions: Sequence[Question],
        *,
        tasks: Sequence[Task] | None = None,
        encoder: Reference | Encoder | None = None,
        namespace: str | None = None,
        trained: Iterable[str] = (),
        rerank: bool | None = None,
        seed: int = 0,
    ) -> Evaluation:
        """Measure how well the right adapter is found for each question; see ``retriever.evaluation``.

        Args:
            questions: prompts, each with the name of the adapter that is right for it.
            tasks: what is searched; by default the adapters in service whose samples were kept.
            encoder: another one than this hub's, to see what switching to it would bring; nothing is stored.
            namespace: only this one's adapters; by default all.
            trained: names of the tasks that the encoder was trained on; all others count as unseen.
            rerank: whether the nearest are reranked by their words; by default as in searches.
            seed: of the bootstrap behind the intervals.

        Raises:
            SamplesError: no adapter in service has samples that were kept.
            ConfigurationError: no question, or one of a task that no adapter is for.
            EmptyPromptError: a question without text.
            ModelNotFoundError: no source has the encoder.
        """
        from lora_hub_sdk.retriever.evaluation import evaluate_retriever

        return evaluate_retriever(
            self.encoder if encoder is None else self._encoder.load(encoder),
            tasks_of(self, namespace) if tasks is None else tasks,
            questions,
            trained=trained,
            rerank=self._retriever.reranks if rerank is None and encoder is None else rerank,
            seed=seed,
        )

    # -- gates --------------------------------------------------------------------------------------------------------

    def train_gate(
        self,
        *,
        base_model: Reference,
        output: Reference,
        fraction: float = 1.0,
        rows: GateRows | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        **recipe: Any,
    ) -> GateReport:
        """Train a RAMoLE gate for strategy "ramole" and write it as one file; ``use_gate`` then answers with it.

        Args:
            base_model: whose adapters in service are trained on; neither they nor it are changed.
            output: a new file. A training that was killed goes on when it is called again.
            fraction: the share of the adapters that is trained on; the others stay unseen, to measure with.
            rows: ``{"inputs", "targets", "adapter"}`` each, or a file of such JSON lines. None takes the registry's
                samples, with each adapter's own answers as targets.
            recipe: what ``GateTrainer`` is made with: width, seed, steps, settings and so on.

        Raises:
            SamplesError: fewer than two adapters that a gate can weigh and that have rows.
            ConfigurationError: a setting that makes no sense, or a file of something else.
            As ``engine``.
        """
        from lora_hub_sdk.engine.gate_training import GateTrainer

        trainer = GateTrainer(**recipe)
        return trainer.fit(
            self, base_model=base_model, output=output, fraction=fraction, rows=rows, namespace=namespace
        )

    def train_experts(
        self,
        *,
        strategy: str,
        base_model: Reference,
        output: Reference,
        experts: Sequence[str] | None = None,
        rows: GateRows | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        **recipe: Any,
    ) -> ExpertReport:
        """Make the gate of a strategy over fixed experts and write it as one file; ``use_gate`` then answers with it.

        Args:
            strategy: "moe-soft", "moe-top3", "moe-top1" or "smear", which are trained, or "arrow", which is computed.
            base_model: that the experts are for; neither they nor it are changed.
            output: a new file. A training that was killed goes on when it is called again.
            experts: names of two or more adapters in service; None is every one that a gate can weigh.
            rows: ``{"inputs", "targets"}`` each, or a file of such JSON lines; none for "arrow".
            recipe: what ``ExpertTrainer`` is made with: seed, steps, settings and so on.

        Raises:
            ConfigurationError: a setting that makes no sense, an adapter that cannot be an expert, rows of another
                form, or a file of something else.
            As ``engine``.
        """
        from lora_hub_sdk.engine.expert_training import ExpertTrainer

        return ExpertTrainer(**recipe).fit(
            self,
            strategy=strategy,
            base_model=base_model,
            output=output,
            experts=experts,
            rows=rows,
            namespace=namespace,
        )

    def use_gate(
        self,
        gate: Reference | Ramole | ExpertGate | None,
        *,
        base_model: Reference | None = None,
        strategy: str | None = None,
    ) -> Ramole | ExpertGate | None:
        """Answer routes of a gate's strategy over a base model with it; None takes it away again.

        It holds for this hub: for its engines that are loaded, and those that will be. Each strategy has its own gate:
        "ramole", and those over fixed experts.

        Args:
            gate: what ``train_gate`` or ``train_experts`` wrote.
            base_model: by default the one that the gate was trained for.
            strategy: with None, whose gate is taken away; by default those of all.

        Raises:
            ConfigurationError: the file is no gate, or one for another base model or strategy; None without a base
                model.
            ModelNotFoundError: nobody has the base model's configuration.
        """
        from lora_hub_sdk.composition.gate_choice import changed_gates
        from lora_hub_sdk.composition.gate_file import load_gate

        chosen = load_gate(gate) if isinstance(gate, str | os.PathLike) else gate
        if base_model is None and chosen is None:
            raise ConfigurationError("gate=None: name the base model that shall be without one")
        name = self._base_name(base_model or (chosen.base_model if chosen else ""))
        if chosen is not None:
            chosen.check_fits(self._layout_of(name).linears)
        with self._lock:
            changed = changed_gates(self._gates.get(name, {}), chosen, strategy)
            if changed:
                self._gates[name] = changed
            else:
                self._gates.pop(name, None)
            for engine in [engine for engine, of in self._made.items() if of == name]:
                engine.use_gate(chosen, strategy=strategy)
        return chosen

    @property
    def gates(self) -> dict[str, dict[str, Ramole | ExpertGate]]:
        """The gates in use, by canonical name of the base model, then by strategy."""
        with self._lock:
            return {name: dict(gates) for name, gates in self._gates.items()}

    # -- how text comes out -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        base_model: Reference | None = None,
        routing: Routing | Sequence[Routing] | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        settings: ModelSettings | None = None,
        timeout_s: float | Sequence[float | None] | None = None,
        client: str | None = None,
    ) -> Completions:
        """Route all prompts, texts or conversations, and answer them together, each with its own adapters.

        Calls from any number of threads and asyncio tasks share the engine's batches.

        Args:
            base_model: a folder, a Hub id, or the embedded "smollm2-135m-instruct". None leaves it to each prompt's
                nearest adapter, as ``route`` does; several base models answer side by side, and each completion's
                trace tells which it was.
            routing: which adapters, and how they combine, for all prompts or for each; by default a uniform mixture of
                the three nearest.
            sampling: how tokens are chosen, for all prompts or for each; by default greedily, at most 128.
            template: see ``engine.prompt.Template``.
            overflow: what happens to a prompt longer than the context: "cut" its front, or "refuse" it.
            settings: how the base model is loaded, the first time it is asked for with these settings.
            timeout_s: seconds for all prompts or for each, from the call on, routing and loading included.
            client: whom the prompts count for where an engine's callers take turns, as a server's users do; by default
                each call counts for itself.

        Raises:
            DeadlineExceededError: one of the answers was not complete in time; the others are given up.
            ConfigurationError: a list of options that is not as long as the prompts.
            As ``route``, ``engine`` and ``Engine.generate``.
        """
        call = Call.of(prompts, base_model, routing, sampling, timeout_s, template, overflow, client)
        if not prompts:
            return []
        routes = self._routes(call, _settings(settings))
        if len(places_by_base(routes)) > 1:
            return run_aside(lambda: self._answers(call, routes, settings))
        making = self._making(call.base_model, routes[0].base_model, settings)
        return self._engines.use(making, lambda engine: engine.generate(call.requests(routes)), call.left_s)

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        *,
        base_model: Reference | None = None,
        routing: Routing | Sequence[Routing] | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        settings: ModelSettings | None = None,
        timeout_s: float | Sequence[float | None] | None = None,
        client: str | None = None,
    ) -> Completions:
        """As ``generate``, without ever blocking the event loop. Cancelling the task gives its prompts up."""
        call = Call.of(prompts, base_model, routing, sampling, timeout_s, template, overflow, client)
        if not prompts:
            return []
        routes = await self._aroutes(call, _settings(settings))
        return await self._answers(call, routes, settings)

    def stream(
        self,
        prompt: Prompt,
        *,
        base_model: Reference | None = None,
        routing: Routing | None = None,
        sampling: Sampling | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        settings: ModelSettings | None = None,
        timeout_s: float | None = None,
        client: str | None = None,
    ) -> Generator[Piece | Completion]:
        """As ``generate`` for one prompt: pieces of text and calls as they become final, then the whole completion.

        Closing the iterator before its end gives the prompt up.
        """
        call = Call.of([prompt], base_model, routing, sampling, timeout_s, template, overflow, client)
        routes = self._routes(call, _settings(settings))
        making = self._making(call.base_model, routes[0].base_model, settings)
        # The engine is not kept for those who read slowly: what it was handed it answers before it goes.
        ticket = self._engines.use(
            making, lambda engine: engine.submit(*call.requests(routes), stream=True), call.left_s
        )
        yield from ticket.pieces()

    async def astream(
        self,
        prompt: Prompt,
        *,
        base_model: Reference | None = None,
        routing: Routing | None = None,
        sampling: Sampling | None = None,
        template: Template = "auto",
        overflow: Overflow = "cut",
        settings: ModelSettings | None = None,
        timeout_s: float | None = None,
        client: str | None = None,
    ) -> AsyncGenerator[Piece | Completion]:
        """As ``stream``, without ever blocking the event loop. Cancelling the task that reads gives the prompt up."""
        call = Call.of([prompt], base_model, routing, sampling, timeout_s, template, overflow, client)
        routes = await self._aroutes(call, _settings(settings))
        making = self._making(call.base_model, routes[0].base_model, settings)
        ticket = await self._engines.ause(
            making, lambda engine: engine.asubmit(*call.requests(routes), stream=True), call.left_s
        )
        async with aclosing(ticket.apieces()) as pieces:
            async for piece in pieces:
                yield piece

    def engine(self, base_model: Reference, settings: ModelSettings | None = None) -> Engine:
        """The engine of a base model; loaded on the first call, shared by all later ones with the same settings.

        Engines that are loaded already go on answering meanwhile. Where ``EngineSettings.base_bytes`` has no room for
        all, one that has nothing to do may be unloaded; then ask for it again.

        Raises:
            ModelNotFoundError: no source has the model.
            ConfigurationError: settings that this machine cannot serve, or a model larger than ``base_bytes``.
            EngineClosedError: the hub was closed.
        """
        return self._engines.use(self._making(base_model, self._base_name(base_model), settings), lambda engine: engine)

    def context(self, base_model: Reference) -> int:
        """How many tokens a prompt and its answer may have together; the model itself is not loaded for it.

        Raises:
            ModelNotFoundError: nobody has the model's configuration.
        """
        name = self._base_name(base_model)
        if name not in self._contexts:
            from lora_hub_sdk.engine.base_model import context_of

            self._contexts[name] = context_of(self._bases.resolve(base_model, config_only=True).folder)
        return self._contexts[name]

    def count_tokens(
        self,
        prompts: Sequence[Prompt],
        *,
        base_model: Reference,
        template: Template = "auto",
        settings: ModelSettings | None = None,
    ) -> Counts:
        """How many tokens each prompt is for a base model, all that the template adds and tells of tools included.

        Raises:
            ConfigurationError: a template that fails, or one that is none.
            As ``engine``; the model is loaded where it is not.
        """
        making = self._making(base_model, self._base_name(base_model), settings)
        return self._engines.use(making, lambda engine: engine.count_tokens(prompts, template=template))

    def unload(self, base_model: Reference, *, timeout_s: float | None = None) -> bool:
        """Free a base model's memory, once its engines have answered what they were handed.

        Whoever asks for it after that has it loaded again. ``False``: it was not loaded.

        Raises:
            DeadlineExceededError: it took longer than ``timeout_s``; it is unloaded as soon as all is answered.
        """
        check_timeout(timeout_s)
        return self._engines.unload(self._base_name(base_model), timeout_s)

    def loaded_bases(self, settings: ModelSettings | None = None) -> tuple[str, ...]:
        """The canonical names of the base models that have an engine, with any settings or with these."""
        keys = self._engines.staying()
        return tuple(sorted({name for name, loaded in keys if settings is None or loaded == settings}))

    def base_models(self, namespace: str | None = None) -> Names:
        """The canonical names of the base models that adapters are registered for, in one namespace or in any."""
        return sorted(self._registry.base_models(namespace))

    def stats(self) -> Stats:
        """What each loaded engine did and holds, for a person to read."""
        return [engine.stats() for engine in self._engines.loaded()]

    def metrics(self) -> str:
        """The metrics of all engines as one page in Prometheus' text format."""
        from lora_hub_sdk.engine.metrics import exposition

        return exposition([engine.metrics for engine in self._engines.loaded()])

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self, timeout_s: float | None = None) -> None:
        """Answer what the engines were handed, then release models, index and database. May be called twice.

        Args:
            timeout_s: what is not answered by then fails with EngineClosedError.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._desk.close()
        self._engines.close(timeout_s)
        self._registry.close()

    def __enter__(self) -> LoraHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- private ------------------------------------------------------------------------------------------------------

    def _routed(self, prompts: Sequence[str], base_model: Reference | None, routing: Routing) -> Routes:
        """What the desk's threads do."""
        name = self._base_name(base_model)
        if name is not None and base_model is not None:
            self._called[name] = base_model
        if routing.bases is not None:
            # Not under the names that they were given, as a folder may be a model of the Hub.
            routing = replace(routing, bases=tuple(self._base_name(base) for base in routing.bases))
        return self._router.route(prompts, name, routing)

    def _routes(self, call: Call, settings: ModelSettings | None = None) -> Routes:
        found: dict[int, Route] = {}
        for routing, places in call.groups():
            asked, routing = [text_of(call.prompts[place]) for place in places], self._with_loaded(routing, settings)
            routes = self._desk.route(asked, call.base_model, routing, timeout_s=call.left_s())
            found.update(zip(places, routes, strict=True))
        return [found[place] for place in range(len(call.prompts))]

    async def _aroutes(self, call: Call, settings: ModelSettings | None = None) -> Routes:
        found: dict[int, Route] = {}
        for routing, places in call.groups():
            asked, routing = [text_of(call.prompts[place]) for place in places], self._with_loaded(routing, settings)
            routes = await self._desk.aroute(asked, call.base_model, routing, timeout_s=call.left_s())
            found.update(zip(places, routes, strict=True))
        return [found[place] for place in range(len(call.prompts))]

    def _with_loaded(self, routing: Routing, settings: ModelSettings | None) -> Routing:
        """With the names of the loaded base models where "loaded" stands for them."""
        if routing.bases != "loaded":
            return routing
        bases = self.loaded_bases(settings)
        if not bases:
            how = "" if settings is None else f" with {settings}"
            raise ConfigurationError(
                f'bases="loaded": no base model is loaded{how}; load one with hub.engine(base_model), name some, or '
                "leave bases=None for all"
            )
        return replace(routing, bases=bases)

    async def _answers(self, call: Call, routes: Routes, settings: ModelSettings | None) -> Completions:
        """Of each base model's engine, side by side."""
        groups = places_by_base(routes)

        def answered(name: str, places: Sequence[int]) -> Coroutine[Any, Any, Completions]:
            making = self._making(call.base_model, name, settings)
            return self._engines.ause(
                making, lambda engine: engine.agenerate(call.requests(routes, places)), call.left_s
            )

        parts = await all_or_none(answered(name, places) for name, places in groups.items())
        found: dict[int, Completion] = {}
        for places, completions in zip(groups.values(), parts, strict=True):
            found.update(zip(places, completions, strict=True))
        return [found[place] for place in range(len(routes))]

    def _making(self, base_model: Reference | None, name: str, settings: ModelSettings | None) -> Making:
        """The engine of a base model by its canonical name, loaded from what the caller calls it, or called it last."""
        from lora_hub_sdk.engine.base_size import estimated_bytes

        called, chosen = base_model or self._called.get(name, name), _settings(settings)
        return Making(
            (name, chosen),
            partial(self._make_engine, called, name, chosen),
            lambda: estimated_bytes(self._bases.resolve(called).folder, chosen),
        )

    def _make_engine(self, base_model: Reference, name: str, settings: ModelSettings) -> Engine:
        from lora_hub_sdk.engine.base_model import load_base_model
        from lora_hub_sdk.engine.engine import Engine

        chosen = self._engine_settings
        engine = Engine(
            load_base_model(self._bases.resolve(base_model), settings),
            limits=chosen.limits,
            host_bytes=chosen.host_bytes,
            device_bytes=chosen.device_bytes,
            load=self._factors_of,
        )
        with self._lock:
            self._made[engine] = name
            for gate in self._gates.get(name, {}).values():
                engine.use_gate(gate)
        return engine

    def _forget_unregistered(self, digests: Collection[str]) -> None:
        """Have the engines forget those of some contents that no adapter has any more."""
        read = self._read.intersection(digests)
        for digest in read - self._registry.store.digests_in_use(read):
            self._read.discard(digest)
            for engine in self._engines.loaded():
                engine.forget(digest)

    @overload
    def _base_name(self, base_model: Reference) -> str: ...
    @overload
    def _base_name(self, base_model: Reference | None) -> str | None: ...
    def _base_name(self, base_model: Reference | None) -> str | None:
        """The canonical name, under which adapters are registered."""
        return None if base_model is None else self._bases.name(base_model, self._registry.base_models)

    def _factors_of(self, adapter: Adapter) -> Unverified:
        """An adapter's factors; files that somebody took out of the cache are pulled again, at the same commit."""
        from lora_hub_sdk.engine.adapter_file import open_factors

        self._read.add(adapter.digest)
        try:
            return open_factors(adapter)
        except AdapterChangedError as error:
            if os.path.isabs(adapter.repo_id):  # a local folder is its owner's
                raise
            # Until they are read, nobody may collect them again.
            with ExitStack() as lease:
                try:
                    pulled = self._source.pull(adapter.repo_id, adapter.revision, lease=lease)
                except LoraHubError as why:
                    raise AdapterChangedError(f"{error}; pulling it again failed: {why}") from why
                return open_factors(replace(adapter, folder=pulled.folder))

    def _proven(self, adapter: Adapter) -> Unverified:
        """As ``_factors_of``, and verified."""
        content = self._factors_of(adapter)
        content.verify()
        return content

    def _layout_of(self, base: str) -> BaseLayout:
        from lora_hub_sdk.engine.shapes import module_layout

        if base not in self._layouts:
            self._layouts[base] = module_layout(self._bases.resolve(base, config_only=True).folder)
        return self._layouts[base]


def _settings(given: ModelSettings | None) -> ModelSettings:
    from lora_hub_sdk.engine.base_model import ModelSettings

    return given or ModelSettings()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may run as a user that has no name
        return "unknown"
