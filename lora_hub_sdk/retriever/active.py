"""The encoder that a hub works with: one of its own, or whichever its registry is searched with at the moment."""

from __future__ import annotations

import os
import threading
from typing import Final

from lora_hub_sdk.errors import ConfigurationError, EncoderMismatchError, ModelNotFoundError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.registry.queries import SqlQueries
from lora_hub_sdk.registry.records import EncoderRecord
from lora_hub_sdk.retriever.encoder import Encoder, SentenceEncoder

#: Of registries that have recorded none yet.
DEFAULT_ENCODER: Final = "all-minilm-l6-v2"

Given = str | os.PathLike[str] | Encoder


class ActiveEncoder:
    """Gives a hub its encoder, loaded when it is first asked for. Thread-safe.

    Args:
        store: where the registry's encoder is recorded.
        given: the hub's own encoder, or a reference to it; None follows the registry.
        instruction: of an encoder that is given by reference; without one, of the embedded one.
    """

    def __init__(
        self,
        store: SqlQueries,
        given: Given | None,
        *,
        instruction: str | None = None,
        endpoint: str | None = None,
        token: str | None = None,
        offline: bool = False,
    ) -> None:
        self._store = store
        self._given = DEFAULT_ENCODER if given is None and instruction is not None else given
        self._instruction = instruction
        self._endpoint, self._token, self._offline = endpoint, token, offline
        self._lock = threading.Lock()
        self._held: Encoder | None = None

    def current(self) -> Encoder:
        """The hub's own encoder, or the one that the registry is searched with now.

        Raises:
            ModelNotFoundError: no source has it.
            EncoderMismatchError: the registry's encoder is an object that only others have, or its files changed.
        """
        held = self._fitting()
        if held is not None:
            return held
        with self._lock:
            held = self._fitting()  # another thread may have loaded it, or another one by now
            if held is None:
                held = self._held = self._load_current()
            return held

    def load(self, given: Given, instruction: str | None = None) -> Encoder:
        """An encoder by reference, or the object that was given.

        Raises:
            ModelNotFoundError: no source has it.
            ConfigurationError: an instruction for an object, which has its own.
        """
        if not isinstance(given, str | os.PathLike):
            if instruction is not None:
                raise ConfigurationError("instruction= is for an encoder that is loaded; give the object its own")
            return given
        resolved = resolve_model(given, endpoint=self._endpoint, token=self._token, offline=self._offline)
        return SentenceEncoder(resolved, instruction=instruction)

    def follow(self, encoder: Encoder) -> None:
        """Follow the registry from now on, which was just switched to this encoder."""
        with self._lock:
            self._given, self._held = None, encoder

    def _fitting(self) -> Encoder | None:
        """What is loaded, if it is still the right one."""
        held = self._held
        if held is None or self._given is not None:
            return held
        record = self._store.active_encoder()
        return held if record is None or record.fingerprint == held.fingerprint else None

    def _load_current(self) -> Encoder:
        if self._given is not None:
            by_reference = isinstance(self._given, str | os.PathLike)
            return self.load(self._given, self._instruction if by_reference else None)
        record = self._store.active_encoder()
        return self.load(DEFAULT_ENCODER) if record is None else self._recorded(record)

    def _recorded(self, record: EncoderRecord) -> Encoder:
        told = f"this registry is searched with encoder {record.name!r} ({record.fingerprint[:12]})"
        if record.reference is None:
            raise EncoderMismatchError(
                f"{told}, an object that cannot be loaded from here; open the hub with it: LoraHub(..., encoder=...)"
            )
        try:
            encoder = self.load(record.reference, record.instruction)
        except ModelNotFoundError as error:
            hint = f"{told}: bring it here, or switch to another by hub.switch_encoder(...)"
            raise type(error)(error.name, [*error.tried, hint]) from error
        if encoder.fingerprint != record.fingerprint:
            raise EncoderMismatchError(
                f"{told}, but {record.reference!r} is another one here ({encoder.fingerprint[:12]}): its files or "
                "settings differ from those that the adapters were embedded with; bring these back, or run "
                f"hub.switch_encoder({record.reference!r}), which embeds the adapters anew"
            )
        return encoder


def record_of(encoder: Encoder) -> EncoderRecord:
    """How an encoder is recorded, so that any process comes by it."""
    if isinstance(encoder, SentenceEncoder):
        return EncoderRecord(encoder.fingerprint, encoder.name, encoder.name, encoder.settings.instruction)
    return EncoderRecord(encoder.fingerprint, encoder.name)
