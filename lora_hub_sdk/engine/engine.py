"""One base model, many adapters, one batch: requests in, completions out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Final

from lora_hub_sdk.composition.compose import ComposedBatch, compose
from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.mapping import build_plan
from lora_hub_sdk.engine.adapter_cache import AdapterCache, load_factors
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.decode import Row, decode
from lora_hub_sdk.engine.lora_layers import LoraLayers
from lora_hub_sdk.engine.prompt import EncodedPrompt, Overflow, PromptEncoder, Template
from lora_hub_sdk.engine.sampling import check_sampling
from lora_hub_sdk.errors import ConfigurationError, EngineClosedError, RegistryError
from lora_hub_sdk.types import Adapter, Completion, Route, Sampling, Trace, Usage

_CACHE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its route and how to answer it."""

    prompt: str
    route: Route
    sampling: Sampling = field(default_factory=Sampling)
    template: Template = "auto"
    overflow: Overflow = "cut"


class Engine:
    """Owns a base model. Thread-safe: concurrent calls take turns, each batch runs alone on the model.

    Args:
        base: the loaded model.
        adapter_cache_bytes: how many bytes of adapters stay in memory between batches.
        max_batch_size: a call with more requests is answered in several forward batches.
        load: reads an adapter that is not in memory.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        adapter_cache_bytes: int = _CACHE_BYTES,
        max_batch_size: int = 64,
        load: Callable[[Adapter], AdapterFactors] = load_factors,
    ) -> None:
        if max_batch_size < 1:
            raise ConfigurationError(f"max_batch_size={max_batch_size}: expected 1 or more")
        self.base = base
        self.batches = 0
        self._max_batch_size = max_batch_size
        self._layers = LoraLayers(base.modules)
        self._cache = AdapterCache(adapter_cache_bytes, load)
        self._lock = threading.Lock()
        self._closed = False

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[int, str], None] | None = None
    ) -> list[Completion]:
        """Answer all requests, in their order; each row gets what it would get alone (exact in float32).

        Args:
            on_text: called with (index of the request, new text) as text becomes final.

        Raises:
            ConfigurationError: sampling settings that make no sense, or an adapter of another base model.
            PromptTooLongError: see ``PromptEncoder.encode``.
            AdapterChangedError: an adapter's files are not what was registered.
            EngineClosedError: after ``close``.
        """
        with self._lock:  # tokenizers are not safe to share between threads
            encoded = [self._encode(place, request) for place, request in enumerate(requests)]
        completions: list[Completion] = []
        for start in range(0, len(requests), self._max_batch_size):
            stop = start + self._max_batch_size
            with self._lock:
                completions += self._run(start, requests[start:stop], encoded[start:stop], on_text)
        return completions

    def stream(self, request: Request) -> Iterator[str | Completion]:
        """Pieces of text as they become final, then the whole completion.

        Decoding runs in a thread of its own, so a slow reader holds up nobody; leaving the iterator early ends it.

        Raises:
            As ``generate``, from the first step of the iteration on.
        """
        pieces: SimpleQueue[str | Completion | Exception] = SimpleQueue()
        left = threading.Event()

        def on_text(_row: int, text: str) -> None:
            if left.is_set():
                raise _ReaderLeftError
            pieces.put(text)

        def work() -> None:
            try:
                pieces.put(self.generate([request], on_text=on_text)[0])
            except Exception as error:  # whatever it is, it belongs to the reader
                pieces.put(error)

        threading.Thread(target=work, name="lora-hub-stream", daemon=True).start()
        try:
            while True:
                piece = pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if isinstance(piece, Completion):
                    return
        finally:
            left.set()

    def close(self) -> None:
        """Wait for the running batch, then refuse further ones. May be called twice."""
        with self._lock:
            self._closed = True

    def compose(self, routes: Sequence[Route]) -> ComposedBatch:
        """The routes of one batch as one LoRA per row, on the model's device and in its dtype.

        Raises:
            RegistryError: an adapter has modules that this base model lacks.
        """
        plan = build_plan(routes)
        adapters = self._cache.get(plan.adapters)
        for adapter, factors in zip(plan.adapters, adapters, strict=True):
            missing = sorted(factors.modules.keys() - self.base.shapes.keys())
            if missing:
                raise RegistryError(
                    f"adapter {adapter.name!r} of base {adapter.base_model!r} has modules that {self.base.id!r} lacks: "
                    f"{', '.join(missing[:3])}"
                )
        return compose(plan, adapters, dtype=self.base.dtype, device=self.base.device)

    def _encode(self, place: int, request: Request) -> EncodedPrompt:
        check_sampling(request.sampling)
        limit = self.base.context - request.sampling.max_new_tokens
        if limit < 1:
            raise ConfigurationError(
                f"max_new_tokens={request.sampling.max_new_tokens} leaves no room for a prompt in a context of "
                f"{self.base.context} tokens"
            )
        encoder = PromptEncoder(self.base.tokenizer, request.template)
        return encoder.encode(request.prompt, limit=limit, overflow=request.overflow, row=place)

    def _run(
        self,
        start: int,
        requests: Sequence[Request],
        prompts: Sequence[EncodedPrompt],
        on_text: Callable[[int, str], None] | None,
    ) -> list[Completion]:
        if self._closed:
            raise EngineClosedError("this engine was closed; open the hub again for a new one")
        composed = self.compose([request.route for request in requests])
        rows = [
            Row(request.sampling, self.base, _for_row(on_text, start + place)) for place, request in enumerate(requests)
        ]
        self.batches += 1
        with self._layers.apply(composed):
            decode(self.base, [prompt.ids for prompt in prompts], rows, layers=self._layers)
        return [
            self._completion(request, prompt, row, len(requests))
            for request, prompt, row in zip(requests, prompts, rows, strict=True)
        ]

    def _completion(self, request: Request, prompt: EncodedPrompt, row: Row, batch_size: int) -> Completion:
        assert row.done is not None
        return Completion(
            row.done.text,
            row.done.finish_reason,
            Usage(len(prompt.ids), row.done.tokens),
            Trace(request.route, batch_size, prompt.truncated),
        )


class _ReaderLeftError(Exception):
    """Nobody reads the stream any more; unwinds the decoding."""


def _for_row(on_text: Callable[[int, str], None] | None, row: int) -> Callable[[str], None] | None:
    return None if on_text is None else lambda text: on_text(row, text)
