"""Intake: how an adapter comes into the registry, and how it moves to another revision."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import (
    AdmissionError,
    ConfigurationError,
    ConflictError,
    EncoderMismatchError,
    InvalidConfigError,
    PinnedError,
)
from lora_hub_sdk.models import BaseModels
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.registry.adapter_config import AdapterConfig, read_adapter_config
from lora_hub_sdk.registry.adapter_tokens import check_tokens
from lora_hub_sdk.registry.admission import Admitted, Limits, admit, check_base_model
from lora_hub_sdk.registry.card_samples import CardSamples
from lora_hub_sdk.registry.inspection import Inspection, inspect_adapter
from lora_hub_sdk.registry.layout import BaseLayout
from lora_hub_sdk.registry.naming import LONGEST_NAME, LONGEST_NAMESPACE, check_name
from lora_hub_sdk.registry.records import Registration, Representation
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.source import CARD, HubSource, Pulled
from lora_hub_sdk.retriever.active import record_of
from lora_hub_sdk.retriever.encoder import Encoder
from lora_hub_sdk.retriever.guess import described
from lora_hub_sdk.retriever.query import names_of
from lora_hub_sdk.retriever.retriever import embed_samples, given_vector
from lora_hub_sdk.retriever.samples import Sample, sample_texts
from lora_hub_sdk.retriever.switching import guessed
from lora_hub_sdk.types import DEFAULT_NAMESPACE, Adapter

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_log = logging.getLogger(__name__)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

Reference = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterRequest:
    """One adapter to be registered; the fields are those of ``LoraHub.register``."""

    reference: Reference
    samples: Iterable[Sample] | os.PathLike[str] | None = None
    embedding: ArrayLike | None = None
    revision: str | None = None
    name: str | None = None
    base_model: Reference | None = None
    description: str | None = None
    tags: Iterable[str] = ()
    namespace: str = DEFAULT_NAMESPACE
    keep_samples: bool = True
    redact: Callable[[str], str] | None = None

    @classmethod
    def of(cls, given: Reference | Mapping[str, Any] | AdapterRequest) -> AdapterRequest:
        """From a reference alone, or a row with these fields.

        Raises:
            ConfigurationError: fields that there are not, or no reference.
        """
        if isinstance(given, AdapterRequest):
            return given
        if isinstance(given, str | os.PathLike):
            return cls(given)
        known = {field.name for field in fields(cls)}
        if not isinstance(given, Mapping) or not isinstance(given.get("reference"), str | os.PathLike):
            raise ConfigurationError(f"{str(given)[:80]!r}: expected a reference, or an object with a 'reference'")
        if unknown := sorted(set(map(str, given)) - known):
            raise ConfigurationError(f"{given['reference']!r}: unknown fields {', '.join(unknown)}")
        return cls(**given)


@dataclass(frozen=True, slots=True)
class RegisterOutcome:
    """What became of one adapter of ``register_many``: the adapter, or the error that kept it out."""

    reference: str
    adapter: Adapter | None
    error: Exception | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Files that were pulled and found good."""

    pulled: Pulled
    admitted: Admitted
    base_model: str


class Intake:
    """Pulls, checks, embeds and registers. Thread-safe.

    Args:
        encoder: gives the encoder when something has to be embedded.
        layouts: gives the layout of a base model.
        card_samples: gives the examples that a pulled adapter's card shows or points to.
    """

    def __init__(
        self,
        registry: Registry,
        source: HubSource,
        bases: BaseModels,
        *,
        encoder: Callable[[], Encoder],
        layouts: Callable[[str], BaseLayout],
        limits: Limits,
        card_samples: Callable[[Pulled], CardSamples],
    ) -> None:
        self._registry = registry
        self._source = source
        self._bases = bases
        self._encoder = encoder
        self._layouts = layouts
        self._limits = limits
        self._card_samples = card_samples

    def register(self, request: AdapterRequest) -> Adapter:
        """See ``LoraHub.register``."""
        label = os.fspath(request.reference)
        if request.samples is not None and request.embedding is not None:
            raise ConfigurationError("register: give samples or an embedding, not both")
        check_name("namespace", request.namespace, LONGEST_NAMESPACE)
        texts = None if request.samples is None else sample_texts(request.samples, label, redact=request.redact)
        with ExitStack() as lease:
            candidate = self._checked(request.reference, request.revision, request.base_model, lease)
            pulled = candidate.pulled
            name = request.name or (pulled.folder.name if pulled.is_local else pulled.repo_id)
            check_name("name", name, LONGEST_NAME)
            known = self._registry.find(name, request.namespace)
            if known is not None:
                self._registry.check_content(known, candidate.admitted.digest)
                if request.embedding is None and (texts is None or self._registry.has_samples(known, texts)):
                    return self._registry.keep_files(known, pulled.folder)
            registration = Registration(
                name=name,
                namespace=request.namespace,
                pulled=pulled,
                admitted=candidate.admitted,
                base_model=candidate.base_model,
                representation=None,
                description=request.description,
                tags=names_of("tags", request.tags),
                follows=None if _COMMIT.fullmatch(request.revision or "") else request.revision,
            )
            represented = partial(self._represented, candidate, texts, request, label)
            return self._embedded(registration, represented, self._registry.add)

    def register_many(
        self,
        requests: Iterable[Reference | Mapping[str, Any] | AdapterRequest],
        *,
        workers: int,
        on_done: Callable[[RegisterOutcome], None],
    ) -> list[RegisterOutcome]:
        """See ``LoraHub.register_many``; ``on_done`` is called as each one ends, by the thread that did it."""

        def one(given: Reference | Mapping[str, Any] | AdapterRequest) -> RegisterOutcome:
            label = str(given.get("reference") if isinstance(given, Mapping) else getattr(given, "reference", given))
            try:
                outcome = RegisterOutcome(label, self.register(AdapterRequest.of(given)), None)
            except Exception as error:  # one failure stops no other, whatever it is
                outcome = RegisterOutcome(label, None, error)
            on_done(outcome)
            return outcome

        pool = ThreadPoolExecutor(workers, thread_name_prefix="register")
        try:
            return list(pool.map(one, requests))
        finally:
            pool.shutdown(cancel_futures=True)

    def update(self, known: Adapter, request: AdapterRequest) -> Adapter:
        """Move an adapter to the revision that ``request`` asks for; of its fields only those of content count."""
        label = known.name
        if request.samples is not None and request.embedding is not None:
            raise ConfigurationError("update: give samples or an embedding, not both")
        if known.pinned:
            raise PinnedError(
                f"{label!r} is pinned to revision {known.revision[:12]}; hub.unpin({label!r}) lets it move"
            )
        texts = None if request.samples is None else sample_texts(request.samples, label, redact=request.redact)
        follows = self._registry.store.follows(known)
        with ExitStack() as lease:
            candidate = self._checked(request.reference, request.revision or follows, known.base_model, lease)
            if candidate.pulled.is_local != os.path.isabs(known.repo_id):
                raise ConfigurationError(
                    f"{label!r} was pulled from the Hub as {known.repo_id!r}, and that is a folder here too; update it "
                    "from another working directory"
                )
            keep = texts is None and request.embedding is None
            same = (candidate.pulled.revision or candidate.admitted.digest[:40]) == known.revision
            if keep and same and candidate.admitted.digest == known.digest:
                return self._registry.keep_files(known, candidate.pulled.folder)
            if keep and known.origin in ("card", "guess"):
                keep = False  # the new card may tell another story
            description, tags = self._registry.store.given(known)
            registration = Registration(
                name=known.name,
                namespace=known.namespace,
                pulled=candidate.pulled,
                admitted=candidate.admitted,
                base_model=known.base_model,
                representation=None,
                description=description,
                tags=tags,
                follows=follows if _COMMIT.fullmatch(request.revision or "") else request.revision or follows,
            )
            represented = partial(self._represented, candidate, texts, request, label)
            move = partial(self._registry.replace, known)
            try:
                return move(registration) if keep else self._embedded(registration, represented, move)
            except ConflictError:
                now = self._registry.get(known.name, known.namespace)
                # Somebody else did the very same.
                if keep and (now.digest, now.revision) == (candidate.admitted.digest, registration.revision):
                    return now
                raise

    def inspect(self, reference: Reference, revision: str | None, base_model: Reference | None) -> Inspection:
        """See ``LoraHub.inspect``."""
        label = os.fspath(reference)
        with ExitStack() as lease:
            pulled = self._source.pull(_typed(reference), revision, lease=lease)
            try:
                config = read_adapter_config(pulled.folder, label)
            except AdmissionError:  # the report tells why
                layout = BaseLayout()
                base = ""
            else:
                base = self._base_of(config, base_model, label)
                layout = self._layouts(base)
            report = inspect_adapter(
                pulled.folder, source=label, layout=layout, limits=self._limits, pickle_files=pulled.pickle_files
            )
            if report.accepted:
                try:
                    check_tokens(pulled.folder, partial(self._base_folder, base), label)
                except AdmissionError as error:
                    report = _refused(report, error)
            return replace(report, repo_id=pulled.repo_id, revision=pulled.revision)

    def _checked(
        self, reference: Reference, revision: str | None, base_model: Reference | None, lease: ExitStack
    ) -> _Candidate:
        label = os.fspath(reference)
        pulled = self._source.pull(_typed(reference), revision, lease=lease)
        config = read_adapter_config(pulled.folder, label)
        base = self._base_of(config, base_model, label)
        admitted = admit(
            pulled.folder,
            source=label,
            layout=self._layouts(base),
            pickle_files=pulled.pickle_files,
            limits=self._limits,
        )
        check_tokens(pulled.folder, partial(self._base_folder, base), label)
        return _Candidate(pulled, admitted, base)

    def _base_folder(self, base: str) -> Path:
        return self._bases.resolve(base, config_only=True).folder

    def _base_of(self, config: AdapterConfig, asked: Reference | None, label: str) -> str:
        """The canonical name of an adapter's base, which must be the one asked for."""
        known = self._registry.base_models
        if asked is None:
            if not config.base_model:
                raise InvalidConfigError(label, "its configuration names no base model; give base_model=...")
            return self._bases.name(config.base_model, known)
        # An absolute path that does not exist here is a folder on the trainer's machine, and says nothing.
        elsewhere = Path(config.base_model).is_absolute() and not Path(config.base_model).exists()
        if not config.base_model or elsewhere:
            return self._bases.name(asked, known)
        found = self._bases.name(config.base_model)
        check_base_model(config, self._bases.name(asked, lambda: [found]), found, label)
        return found

    def _embedded(
        self,
        registration: Registration,
        represented: Callable[[Encoder], Representation],
        write: Callable[[Registration], Adapter],
    ) -> Adapter:
        """Write a registration with its vector, made again where the registry's encoder was switched meanwhile."""
        while True:
            encoder = self._encoder()
            representation = represented(encoder)
            try:
                return write(replace(registration, representation=representation))
            except EncoderMismatchError:
                # Nobody but its owner can tell an owner's vector under another encoder.
                if representation.origin == "owner" or self._encoder().fingerprint == encoder.fingerprint:
                    raise

    def _represented(
        self,
        candidate: _Candidate,
        texts: tuple[str, ...] | None,
        request: AdapterRequest,
        label: str,
        encoder: Encoder,
    ) -> Representation:
        record = record_of(encoder)
        of = partial(
            Representation,
            encoder=record.fingerprint,
            encoder_name=record.name,
            reference=record.reference,
            instruction=record.instruction,
        )
        if request.embedding is not None:
            return of(given_vector(request.embedding, encoder, label), origin="owner")
        if texts is not None:
            vector = embed_samples(encoder, texts, label)
            return of(vector, origin="samples", texts=texts if request.keep_samples else (), count=len(texts))
        found = self._card_samples(candidate.pulled)
        if found.texts:
            texts = sample_texts(found.texts, label, redact=request.redact)
            _log.info("%s: %d samples from %s", label, len(texts), found.source)
            vector = embed_samples(encoder, texts, label)
            return of(vector, origin="card", texts=texts if request.keep_samples else (), count=len(texts))
        pulled = candidate.pulled
        name, summary = request.name or pulled.repo_id, read_card(pulled.folder / CARD).summary
        text = described(name, request.description, pulled.description, summary, tags=pulled.tags)
        _log.warning(
            "%s came without samples and its card shows none: its vector is guessed, and its hits have low trust", label
        )
        base, folder = candidate.base_model, pulled.folder
        vector = guessed(self._registry, encoder, base, request.namespace, folder, text, label)
        return of(vector, origin="guess")


def _refused(report: Inspection, error: AdmissionError) -> Inspection:
    """A report on an adapter that was found good until then, and whose tokenizer is not."""
    checks = tuple(
        replace(check, passed=False, detail=error.problem) if check.name == "features" else check
        for check in report.checks
    )
    return replace(report, accepted=False, error=type(error).__name__, message=str(error), checks=checks)


def _typed(reference: Reference) -> str | Path:
    return reference if isinstance(reference, str) else Path(reference)
