"""One base model, many adapters, many callers: requests in, completions out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import count
from queue import SimpleQueue
from time import sleep
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.expert_gate import ExpertGate
from lora_hub_sdk.composition.gate_choice import changed_gates, gate_for
from lora_hub_sdk.engine.adapter_file import Unverified, open_factors
from lora_hub_sdk.engine.adapter_store import AdapterStore
from lora_hub_sdk.engine.adapter_templates import AdapterTemplates
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.call import check_timeout
from lora_hub_sdk.engine.prompt import EncodedPrompt, PromptEncoder, Template
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.engine.request import Job, Request
from lora_hub_sdk.engine.row_maker import NewRow, RowMaker, is_plain
from lora_hub_sdk.engine.sampling import check_sampling
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.engine.settings import HOST_BYTES
from lora_hub_sdk.engine.ticket import Ticket
from lora_hub_sdk.engine.worker import Worker
from lora_hub_sdk.errors import ConfigurationError, EngineBusyError
from lora_hub_sdk.messages import Conversation, Piece, Prompt
from lora_hub_sdk.models.openmp import give_threads_back
from lora_hub_sdk.types import Adapter, Completion

if TYPE_CHECKING:
    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.composition.gates import Gate
    from lora_hub_sdk.engine.metrics import EngineMetrics, EngineStats

#: On a CPU; on a GPU so much of the memory that is free once the model is there.
_DEVICE_BYTES: Final = 2 << 30
_CACHE_BYTES: Final = 2 << 30
_DEVICE_SHARE: Final = 0.2
_CACHE_SHARE: Final = 0.6
#: A call that was begun asks for more room again after so many seconds, where others took what there was.
_AGAIN_S: Final = 0.005
#: Characters that an event loop may encode itself.
_SHORT: Final = 4096


#: A prompt, and what makes the row of its answer.
_Encoded = tuple[EncodedPrompt, NewRow]


class Engine:
    """Owns a base model and answers with it. Thread-safe, and at home in asyncio.

    All callers share the forward passes of one thread, which starts with the first request and ends when there is
    nothing to do. In float32 each answer is the one that its request would get alone.

    Args:
        base: the loaded model.
        limits: what may run and wait at once; by default what fits into 2 GiB of keys and values on a CPU, or into
            60 % of the free memory of a GPU.
        host_bytes: memory for adapters that were read, beside those in use.
        device_bytes: memory for adapters in the form and dtype in which the model uses them; by default 2 GiB on a
            CPU, 20 % of the free memory of a GPU. What runs at once never needs more, unless one request alone does.
        load: reads an adapter that is not in memory.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        limits: EngineLimits | None = None,
        host_bytes: int = HOST_BYTES,
        device_bytes: int | None = None,
        load: Callable[[Adapter], AdapterFactors | Unverified] = open_factors,
    ) -> None:
        self.base = base
        budget = _budget(base, _DEVICE_BYTES, _DEVICE_SHARE) if device_bytes is None else device_bytes
        if limits is None:
            limits = EngineLimits(max_tokens=max(_budget(base, _CACHE_BYTES, _CACHE_SHARE) // _place_bytes(base), 1))
        limits = replace(limits, max_ranks=max(min(limits.max_ranks, budget // _rank_bytes(base)), 1))
        self._worker = Worker(base, RankPool.of(base, budget), AdapterStore(host_bytes, _fitted(base, load)), limits)
        self._gates: Mapping[str, Gate] = {}
        self._choosing = threading.Lock()
        # Packing weights has left threads waiting in this thread, which another one shall have.
        give_threads_back()
        self._limits = limits
        self._ids = count(1)
        self._templates = AdapterTemplates(base.tokenizer.chat_template)
        self._tokenizing = threading.RLock()  # tokenizers are not safe to share between threads
        self._rows = RowMaker(base, self._tokenizing)
        self._aside = ThreadPoolExecutor(1, "lora-hub-tokenize")

    # -- seeing it ----------------------------------------------------------------------------------------------------

    @property
    def batches(self) -> int:
        """How many batches of prompts were read since the engine was made."""
        return self._worker.batches

    @property
    def metrics(self) -> EngineMetrics:
        """For Prometheus: ``engine.metrics.text()``, or its ``registry``."""
        return self._worker.metrics

    def stats(self) -> EngineStats:
        """What it did and holds, for a person to read."""
        return self.metrics.stats()

    # -- answers ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request, *, stream: bool = False) -> Ticket:
        """Hand a request in and go on; the ticket has the answer once it is there.

        Raises:
            ConfigurationError: sampling settings that make no sense, a timeout below 0, a conversation that the chat
                template refuses, or a constraint or tools that no answer can be held to.
            PromptTooLongError: see ``PromptEncoder.encode``.
            EngineBusyError: too many requests wait already.
            EngineClosedError, EngineCrashedError: nobody answers any more.
        """
        return self._submit([request], [self._encode(0, request)], [partial(Ticket, stream=stream)])[0]

    async def asubmit(self, request: Request, *, stream: bool = False) -> Ticket:
        """As ``submit``, without blocking the event loop."""
        encoded = await self._aencoded([request])
        return self._submit([request], encoded, [partial(Ticket, stream=stream)])[0]

    def submit_many(self, requests: Sequence[Request]) -> list[Ticket]:
        """As ``submit``; all are taken or none, and they take turns with others as one."""
        encoded = self._encoded(requests)
        return self._submit(requests, encoded, [partial(Ticket, stream=False)] * len(requests))

    def generate(
        self, requests: Sequence[Request], *, on_text: Callable[[int, str], None] | None = None
    ) -> list[Completion]:
        """Answer all requests, in their order, however many they are.

        Args:
            on_text: called in this thread with (index of the request, new text) as text becomes final; calls of tools
                are in the completions alone.

        Raises:
            As ``submit``, and whatever kept a request from its answer; the others are given up then.
        """
        encoded = self._encoded(requests)
        tickets: list[Ticket] = []
        shown: SimpleQueue[tuple[int, str | None]] = SimpleQueue()
        oldest = 0
        client = f"call {next(self._ids)}"
        try:
            while len(tickets) < len(requests):
                place = len(tickets)
                oldest = _first_pending(tickets, oldest)
                if oldest < place and not self._worker.room:
                    tickets[oldest].future.exception()  # waits
                    continue
                part = slice(place, place + max(self._worker.room, 1))
                make = [
                    partial(Ticket, stream=False) if on_text is None else partial(_Shown, shown, place + at)
                    for at in range(len(requests[part]))
                ]
                try:
                    tickets += self._submit(requests[part], encoded[part], make, client)
                except EngineBusyError:  # others were quicker
                    if not tickets and not self._worker.room:
                        raise
                    sleep(_AGAIN_S)
            if on_text is not None:
                ended = 0
                while ended < len(tickets):
                    place_, text = shown.get()
                    if text is None:
                        ended += 1
                        tickets[place_].result()
                    else:
                        on_text(place_, text)
            # One that failed is told at once, and not behind those that were handed in before it.
            done, _ = wait([ticket.future for ticket in tickets], return_when=FIRST_EXCEPTION)
            for ticket in tickets:
                if ticket.future in done:
                    ticket.result()
            return [ticket.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def agenerate(self, requests: Sequence[Request]) -> list[Completion]:
        """As ``generate``, without blocking the event loop. Cancelling the task gives its requests up."""
        encoded = await self._aencoded(requests)
        tickets: list[Ticket] = []
        oldest = 0
        client = f"call {next(self._ids)}"
        try:
            while len(tickets) < len(requests):
                place = len(tickets)
                oldest = _first_pending(tickets, oldest)
                if oldest < place and not self._worker.room:
                    await tickets[oldest].aresult()
                    continue
                part = slice(place, place + max(self._worker.room, 1))
                make = [partial(Ticket, stream=False)] * len(requests[part])
                try:
                    tickets += self._submit(requests[part], encoded[part], make, client)
                except EngineBusyError:  # others were quicker
                    if not tickets and not self._worker.room:
                        raise
                    await asyncio.sleep(_AGAIN_S)
            return list(await asyncio.gather(*(ticket.aresult() for ticket in tickets)))
        finally:
            for ticket in tickets:
                ticket.cancel()

    def stream(self, request: Request) -> Generator[Piece | Completion]:
        """Pieces of text as they become final, then the whole completion. Leaving the iterator early gives it up.

        Raises:
            As ``submit``, from the first step of the iteration on.
        """
        yield from self.submit(request, stream=True).pieces()

    async def astream(self, request: Request) -> AsyncGenerator[Piece | Completion]:
        """As ``stream``, without blocking the event loop."""
        ticket = await self.asubmit(request, stream=True)
        async with aclosing(ticket.apieces()) as pieces:
            async for piece in pieces:
                yield piece

    def count_tokens(self, prompts: Sequence[Prompt], *, template: Template = "auto") -> list[int]:
        """How many tokens each prompt is, all that the template adds and tells of tools included.

        Raises:
            ConfigurationError: a template that fails, or one that is none.
        """
        encoder = PromptEncoder(self.base.tokenizer, template)
        with self._tokenizing:
            return [encoder.count(prompt) for prompt in prompts]

    # -- gates --------------------------------------------------------------------------------------------------------

    @property
    def gates(self) -> Mapping[str, Gate]:
        """By strategy, what finds the weights of routes that are weighed by a gate."""
        return self._gates

    def use_gate(self, gate: Gate | None, *, strategy: str | None = None) -> None:
        """Use this gate for requests of its strategy handed in from now on; those before keep theirs.

        Args:
            gate: None takes the gate of ``strategy`` away, or those of all.

        Raises:
            ConfigurationError: it is for other modules than this model's, or for another strategy.
        """
        if gate is not None:
            _check_gate(gate, self.base)
        with self._choosing:
            self._gates = changed_gates(self._gates, gate, strategy)
            self._worker.use_gates(tuple(self._gates.values()))

    # -- end ----------------------------------------------------------------------------------------------------------

    def forget(self, digest: str) -> None:
        """Free what is held of an adapter as soon as nobody uses it; requests that name it read it again."""
        self._worker.forget(digest)

    def close(self, timeout_s: float | None = None) -> None:
        """Answer what was handed in, then refuse more. May be called twice.

        Args:
            timeout_s: what is not answered by then fails with EngineClosedError.
        """
        self._worker.close(timeout_s)

    # -- private ------------------------------------------------------------------------------------------------------

    def _submit(
        self,
        requests: Sequence[Request],
        encoded: Sequence[_Encoded],
        make: Sequence[Callable[[Callable[[], None]], Ticket]],
        client: str | None = None,
    ) -> list[Ticket]:
        client = client or f"call {next(self._ids)}"
        jobs = []
        gates = self._gates
        for request, (prompt, new_row), ticket_of in zip(requests, encoded, make, strict=True):
            gate = gate_for(request.route, gates, self.base.id)
            job_id = next(self._ids)
            ticket = ticket_of(partial(self._worker.withdraw, job_id))
            row = new_row(ticket.show if ticket.streams else None)
            jobs.append(Job(job_id, request.client or client, request, prompt, row, ticket, gate))
        self._worker.submit(jobs)
        return [job.ticket for job in jobs]

    async def _aencoded(self, requests: Sequence[Request]) -> list[_Encoded]:
        """Short prompts are encoded at once, which takes a fraction of a millisecond; a megabyte takes seconds.

        So do grammars, which are compiled elsewhere too.
        """
        short = sum(_size(request.prompt) for request in requests) <= _SHORT
        quick = short and all(is_plain(request.prompt, request.sampling) for request in requests)
        if quick and self._tokenizing.acquire(blocking=False):
            try:
                return self._encoded(requests)
            finally:
                self._tokenizing.release()
        return await asyncio.get_running_loop().run_in_executor(self._aside, self._encoded, requests)

    def _encoded(self, requests: Sequence[Request]) -> list[_Encoded]:
        return [self._encode(place, request) for place, request in enumerate(requests)]

    def _encode(self, place: int, request: Request) -> _Encoded:
        check_sampling(request.sampling)
        check_timeout(request.timeout_s)
        limit = self.base.context - request.sampling.max_new_tokens
        if limit < 1:
            raise ConfigurationError(
                f"max_new_tokens={request.sampling.max_new_tokens} leaves no room for a prompt in a context of "
                f"{self.base.context} tokens"
            )
        own = self._templates.of(request.route, request.template)
        encoder = PromptEncoder(self.base.tokenizer, request.template, own=own, rows=self.base.vocabulary)
        with self._tokenizing:
            prompt = encoder.encode(request.prompt, limit=limit, overflow=request.overflow, row=place)
        return prompt, self._rows.prepare(request.prompt, request.sampling, encoder.tool_format)


def _fitted(
    base: BaseModel, load: Callable[[Adapter], AdapterFactors | Unverified]
) -> Callable[[Adapter], AdapterFactors | Unverified]:
    """Reads adapters and fits them to the base, both on the loader's thread."""
    from lora_hub_sdk.engine.fitting import Fitting

    fitting = Fitting(base.modules, embedding=base.embedding)

    def loaded(adapter: Adapter) -> AdapterFactors | Unverified:
        found = load(adapter)
        plain = found.factors if isinstance(found, Unverified) else found
        fitted = fitting.fit(plain)
        if fitted is plain:
            return found
        give_threads_back()  # fitting computes, and the engine's steps need all cores
        return replace(found, factors=fitted) if isinstance(found, Unverified) else fitted

    return loaded


def _check_gate(gate: Gate, base: BaseModel) -> None:
    if isinstance(gate, ExpertGate):
        gate.check_fits(base.shapes)
        return
    for path, (d_out, d_in) in base.shapes.items():
        own = gate.module(path)
        if own is None:
            continue
        found, expected = [tuple(one.shape) for one in own], [(gate.width, d_in), (d_out, gate.width)]
        if found != expected:
            raise ConfigurationError(
                f"the gate has shapes {found} at {path!r}, base model {base.id!r} needs {expected}; it was trained for "
                "another base"
            )


def _first_pending(tickets: Sequence[Ticket], place: int) -> int:
    """The first place from that on whose request is not answered yet, or the place after all of them."""
    while place < len(tickets) and tickets[place].future.done():
        place += 1
    return place


class _Shown(Ticket):
    """A ticket whose pieces go to a queue that it shares with others; None tells that it has ended."""

    def __init__(self, shown: SimpleQueue[tuple[int, str | None]], place: int, on_cancel: Callable[[], None]) -> None:
        super().__init__(on_cancel, stream=True)
        self._shown, self._place = shown, place
        self.future.add_done_callback(lambda _: shown.put((place, None)))

    def show(self, piece: Piece) -> None:
        if isinstance(piece, str):
            self._shown.put((self._place, piece))


def _size(prompt: Prompt) -> int:
    """Characters to encode."""
    if isinstance(prompt, Conversation):
        calls = [call.arguments for message in prompt.messages for call in message.tool_calls]
        texts = [message.text for message in prompt.messages] + [tool.parameters for tool in prompt.tools]
        return sum(map(len, calls + texts))
    return len(prompt)


def _budget(base: BaseModel, on_cpu: int, share: float) -> int:
    if base.device.type != "cuda":
        return on_cpu
    import torch

    free, _ = torch.cuda.mem_get_info(base.device)
    return int(free * share)


def _rank_bytes(base: BaseModel) -> int:
    """Of one rank in all linear modules."""
    return sum(rows + columns for rows, columns in base.shapes.values()) * base.dtype.itemsize


def _place_bytes(base: BaseModel) -> int:
    """Of one token's keys and values in all layers."""
    model: Any = base.model
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * base.dtype.itemsize)
