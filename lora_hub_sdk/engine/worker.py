"""The one thread that owns the model: takes requests in, lets them join, reads prompts, decodes, answers.

Other threads only put messages into its inbox. Requests join while others decode (continuous batching): in each round
one piece of a prompt is read, then every running row gets one token.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from lora_hub_sdk.composition.combining import check_combining
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine.adapter_store import AdapterStore, Held
from lora_hub_sdk.engine.base_model import BaseModel
from lora_hub_sdk.engine.batch_lora import RowLora
from lora_hub_sdk.engine.logs import log_crash, log_request, log_split
from lora_hub_sdk.engine.metrics import EngineMetrics, EngineState, Outcome, TierState
from lora_hub_sdk.engine.rank_pool import RankPool, UnprovenError
from lora_hub_sdk.engine.request import Job
from lora_hub_sdk.engine.running import Model, Prefill, RunningRows, drop_places, places_to_read, prefill_groups
from lora_hub_sdk.engine.scheduler import EngineLimits, Entry, Scheduler
from lora_hub_sdk.errors import (
    AdapterChangedError,
    DeadlineExceededError,
    EngineBusyError,
    EngineClosedError,
    EngineCrashedError,
    EngineMemoryError,
    GenerationError,
    LoraHubError,
    RegistryError,
)
from lora_hub_sdk.models.openmp import give_threads_back
from lora_hub_sdk.types import Adapter, Completion, Tier, Trace, Usage

if TYPE_CHECKING:
    from torch import Tensor

    from lora_hub_sdk.composition.factors import AdapterFactors
    from lora_hub_sdk.composition.gates import Gate

#: An idle thread ends after so many seconds; the next request starts another. So a forgotten engine costs nothing.
_LINGER_S: Final = 5.0
#: An idle engine waits so long for adapters that are being read, so that the requests of one call start together.
_LOADING_S: Final = 0.05
#: While rows decode, prompts are read in pieces of so many places, so that no long prompt holds the others up.
_PIECE: Final = {"cpu": 256, "cuda": 2048}


#: Those that may have a thread. Python kills daemon threads as it exits, and one inside torch takes the process along.
_WORKERS: Final[WeakSet[Worker]] = WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_WORKERS):
        worker.close(0.0)


@dataclass(eq=False)
class _Reading:
    """Prompts that are read side by side, and whose they are."""

    prefill: Prefill
    jobs: list[Job]
    seconds: float = 0.0


class Worker:
    """See the module. ``submit``, ``forget`` and ``close`` may be called from any thread.

    Args:
        pool: the device tier, this thread's alone.
        store: the host tier.
    """

    def __init__(self, base: BaseModel, pool: RankPool, store: AdapterStore, limits: EngineLimits) -> None:
        self._base, self._pool, self._store, self._limits = base, pool, store, limits
        self.metrics = EngineMetrics(base.id, self._state)
        self.batches = 0
        self._model = Model(base, pool)
        self._scheduler = Scheduler(limits)
        self._jobs: dict[int, Job] = {}
        self._loading: set[int] = set()
        self._readings: deque[_Reading] = deque()
        self._rows: list[Job] = []
        self._tokens: list[int] = []  # what each row is given next
        self._running = RunningRows(self._model)
        self._piece = _PIECE.get(base.device.type, _PIECE["cuda"])
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._crash: BaseException | None = None
        _WORKERS.add(self)

    # -- from any thread ----------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more may wait."""
        return max(self._limits.max_waiting - self._waiting, 0)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take jobs in, all or none.

        Raises:
            EngineBusyError: more would wait than may.
            EngineClosedError, EngineCrashedError: there is nobody to do them.
        """
        with self._lock:
            self._check_open()
            if self._waiting + len(jobs) > self._limits.max_waiting:
                self.metrics.refused()
                raise EngineBusyError(
                    f"{len(jobs)} more requests beside {self._waiting} that wait; the engine takes "
                    f"{self._limits.max_waiting} (EngineLimits.max_waiting); try again later"
                )
            self._waiting += len(jobs)
            self._inbox.put(partial(self._take_in, jobs))
            if self._thread is None:
                thread = threading.Thread(target=self._main, name="lora-hub-engine", daemon=True)
                thread.start()
                self._thread = thread
        for job in jobs:
            adapters = _adapters(job)
            if adapters:
                self._store.prefetch(adapters, partial(self._note_loaded, job))

    def withdraw(self, job_id: int) -> None:
        """Give a job up. Takes no lock: it may be called from within a garbage collection."""
        self._inbox.put(partial(self._withdraw, job_id))

    def forget(self, digest: str) -> None:
        """Free what is held of an adapter, once nobody uses it."""
        self._store.discard(digest)
        self._inbox.put(partial(self._forget, digest))

    def use_gates(self, gates: Collection[Gate]) -> None:
        """Have ready what these gates need; what others need goes as soon as no job is here."""
        self._inbox.put(partial(self._pool.use_gates, gates))

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what was taken in, then end; what is not done after ``timeout_s`` fails. May be called twice.

        Raises:
            Nothing: requests that could not be finished have EngineClosedError.
        """
        with self._lock:
            self._closed = True
            thread = self._thread
        self._inbox.put(lambda: None)  # wakes it up
        if thread is threading.current_thread():  # in a callback of a ticket: it ends by itself, after the others
            return
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                self._inbox.put(self._abandon)
                thread.join()
        self._store.close()

    def _note_loaded(self, job: Job, answer: Held | BaseException) -> None:
        with self._lock:
            if self._thread is not None:
                self._inbox.put(partial(self._loaded, job, answer))
                return
        # The job was given up, and the thread did not wait for its adapters.
        if isinstance(answer, Held):
            answer.release()

    def _check_open(self) -> None:
        if self._crash is not None:
            raise _crashed(self._crash)
        if self._closed:
            raise EngineClosedError("this engine was closed; open the hub again for a new one")

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        import torch

        try:
            with torch.inference_mode():
                while self._round():
                    pass
            if self._closed:
                self._store.close()
        except BaseException as error:
            self._crashed(error)

    def _round(self) -> bool:
        """Messages, then one piece of a prompt and one step; False where the thread ends."""
        if not (self._rows or self._readings):
            if not self._jobs:
                give_threads_back()
            try:
                self._inbox.get(timeout=self._patience())()
            except Empty:
                if not self._jobs and self._ends():
                    return False
        while not self._inbox.empty():
            self._inbox.get()()
        now = monotonic()
        for late in self._scheduler.expired(now):
            self._end(self._jobs[late], "deadline", _late(self._jobs[late]))
        # Before others join: the scheduler counts on their places.
        self._drop([place for place, job in enumerate(self._rows) if job.over])
        if self._closed and not self._jobs and self._ends():
            return False
        if not self._waits_for_adapters(now):
            self._admit([self._jobs[job_id] for job_id in self._scheduler.admit(now)])
        if self._readings:
            self._read()
        if self._rows:
            self._step()
        return True

    def _patience(self) -> float:
        """How long nothing has to be done without a message."""
        if not self._jobs:
            return 0.0 if self._closed else _LINGER_S
        now = monotonic()
        at = self._scheduler.wake_at(now)
        if at is not None and at <= now and self._waits_for_adapters(now):
            return _LOADING_S / 10
        return threading.TIMEOUT_MAX if at is None else max(at - now, 0.0)

    def _waits_for_adapters(self, now: float) -> bool:
        """Whether an idle engine lets those that are ready wait for those whose adapters are just being read."""
        if not self._loading or self._rows or self._readings:
            return False
        return now - min(self._jobs[job_id].submitted for job_id in self._loading) < _LOADING_S

    def _ends(self) -> bool:
        """Whether this thread ends; whoever submits after that starts another."""
        self._pool.compact()
        with self._lock:
            if self._inbox.empty():
                self._thread = None
                return True
        return False

    # -- messages -----------------------------------------------------------------------------------------------------

    def _take_in(self, jobs: Sequence[Job]) -> None:
        self._jobs |= {job.id: job for job in jobs}
        for job in jobs:
            adapters = _adapters(job)
            entry = Entry(
                id=job.id,
                client=job.client,
                width=len(job.prompt.ids) + job.request.sampling.max_new_tokens,
                prompt_tokens=len(job.prompt.ids),
                ranks=sum(adapter.rank for adapter in adapters),
                arrived=job.submitted,
                deadline=None if job.request.timeout_s is None else job.submitted + job.request.timeout_s,
            )
            if job.ticket.future.done():  # cancelled, or a message that it was is on its way
                self._end(job, "cancelled")
            elif self._scheduler.offer(entry, ready=not adapters):
                if adapters:
                    self._loading.add(job.id)
            else:
                self.metrics.refused()
                self._end(job, "busy", EngineBusyError("too many requests wait; try again later"))

    def _loaded(self, job: Job, answer: Held | BaseException) -> None:
        self._loading.discard(job.id)
        if isinstance(answer, Held) and not job.over:
            job.held, job.load_s = answer, answer.loaded_s
            self._scheduler.ready(job.id)
        elif isinstance(answer, Held):
            answer.release()
        elif not job.over:
            self._end(job, "error", answer)

    def _withdraw(self, job_id: int) -> None:
        job = self._jobs.get(job_id)
        if job is not None:
            self._end(job, "cancelled")

    def _forget(self, digest: str) -> None:
        self._pool.discard(digest)

    def _abandon(self) -> None:
        for job in list(self._jobs.values()):
            self._end(job, "error", EngineClosedError("this engine was closed before the answer was complete"))

    # -- joining ------------------------------------------------------------------------------------------------------

    def _admit(self, jobs: Sequence[Job]) -> None:
        """Bring these jobs' adapters to the model and begin to read their prompts."""
        ready = []
        for job in jobs:
            if job.admitted is None:
                job.admitted = monotonic()
                with self._lock:
                    self._waiting -= 1
            try:
                self._place(job)
            except Exception as error:
                self._failed([job], error)
            else:
                ready.append(job)
        for group in prefill_groups([len(job.ids) for job in ready]):
            self._begin([ready[place] for place in group])

    def _place(self, job: Job) -> None:
        """The job's adapters into the pool, pinned there."""
        factors = {} if job.held is None else {one.digest: one for one in job.held.factors}
        if not job.tiers and job.held is not None:
            tiers: dict[str, Tier] = {}
            for adapter, origin in zip(_adapters(job), job.held.origins, strict=True):
                tiers[adapter.digest] = "device" if adapter.digest in self._pool else origin
            job.tiers = tuple(tiers[member.adapter.digest] for member in job.request.route.members)
            for tier in job.tiers:
                self.metrics.found(tier)
        for adapter in _adapters(job):
            own = factors[adapter.digest]
            missing = sorted(own.modules.keys() - self._base.shapes.keys() - {self._base.embedding})
            missing += sorted(own.saved.keys() - self._base.modules.keys())
            if missing:
                raise RegistryError(
                    f"adapter {adapter.name!r} of base {adapter.base_model!r} has modules that {self._base.id!r} "
                    f"lacks: {', '.join(missing[:3])}"
                )
        check_combining(job.request.route, factors)
        job.terms = terms_of(job.request.route, {digest: one.rank for digest, one in factors.items()})
        if job.gate is not None:
            self._pool.add_gate(job.gate)
            if job.request.route.averaged == "prompt" and job.kept is None:
                job.kept = {}
        pinned: list[str] = []
        try:
            rows: list[int] = []
            for digest in job.terms.digests:
                rows += self._pin(job, factors[digest])
                pinned.append(digest)
        except BaseException:
            for digest in pinned:
                self._pool.unpin(digest)
            raise
        job.lora = RowLora(job.terms, tuple(rows), None if job.gate is None else job.gate.digest, job.kept)

    def _pin(self, job: Job, factors: AdapterFactors) -> tuple[int, ...]:
        try:
            return self._pool.pin(factors, proven=job.verified)
        except UnprovenError:
            for other in self._jobs.values():
                if other.lora is not None and factors.digest in other.lora.terms.digests:
                    with suppress(AdapterChangedError):  # that is the other's own trouble
                        self._verify(other)
        return self._pool.pin(factors, proven=job.verified)

    def _verify(self, job: Job) -> None:
        """Nothing is delivered before it is known that the job's adapters are the registered ones."""
        if not job.verified and job.held is not None:
            job.held.verify()
            job.verified = True
            for factors in job.held.factors:
                self._pool.prove(factors)

    def _begin(self, jobs: list[Job]) -> None:
        try:
            prefill = Prefill(self._model, [job.ids for job in jobs], [_lora(job) for job in jobs])
        except Exception as error:
            self._failed(jobs, error)
            return
        self.batches += 1
        self._readings.append(_Reading(prefill, jobs))

    def _read(self) -> None:
        """One piece of the prompts that are next; all of them where nobody is held up by it."""
        reading = self._readings[0]
        if all(job.over for job in reading.jobs):
            self._readings.popleft()
            return
        began = monotonic()
        try:
            places = places_to_read(self._piece, len(self._rows), sum(len(one.jobs) for one in self._readings))
            logits = reading.prefill.advance(reading.prefill.places if places is None else places)
            greedy = [] if logits is None else _best(logits)
        except Exception as error:
            self._readings.popleft()
            self._failed(reading.jobs, error)
            return
        now = monotonic()
        reading.seconds += now - began
        if logits is None:
            return
        self._readings.popleft()
        self.metrics.prefill(len(reading.jobs), sum(reading.prefill.lengths), reading.seconds)
        stay: list[int] = []
        for place, job in enumerate(reading.jobs):
            if job.over:
                continue
            job.prefilled = job.prefilled or now
            job.widest = max(job.widest, len(reading.jobs))
            if self._goes_on(job, logits[place], greedy[place]):
                stay.append(place)
        jobs = [reading.jobs[place] for place in stay]
        if not jobs:
            return
        try:
            self._running.join(reading.prefill, stay)
        except Exception as error:
            self._failed(jobs, error)
            return
        self._rows += jobs
        self._tokens += [job.row.tokens[-1] for job in jobs]
        for job in self._rows:
            job.widest = max(job.widest, len(self._rows))

    # -- decoding -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One token for every running row."""
        began, rows = monotonic(), list(self._rows)
        try:
            logits = self._running.step(self._tokens)
            greedy = _best(logits)
        except Exception as error:
            self._rows, self._tokens = [], []
            self._running = RunningRows(self._model)
            self._failed(rows, error)
            return
        self.metrics.step(len(rows), monotonic() - began)
        self._tokens = [token or 0 for token in greedy]  # those that have ended are dropped below
        for place, job in enumerate(rows):
            if self._goes_on(job, logits[place], greedy[place]):
                self._tokens[place] = job.row.tokens[-1]
        self._drop([place for place, job in enumerate(rows) if job.over])

    def _goes_on(self, job: Job, logits: Tensor, greedy: int | None) -> bool:
        """Take the job's next token; False where it has ended by that. What goes wrong here is that row's alone."""
        try:
            self._verify(job)
            if greedy is None:
                raise GenerationError(
                    "the model's scores are no numbers any more on this prompt, which in float16 is an overflow; "
                    "use dtype='bfloat16' or 'float32'"
                )
            job.row.step(logits, greedy)
        except Exception as error:
            if isinstance(error, AdapterChangedError):
                self._distrust(job)
            self._end(job, "error", _explained(job, error))
            return False
        done = job.row.done
        if done is not None:
            self._end(job, done.finish_reason)
        return done is None

    def _drop(self, places: Sequence[int]) -> None:
        if places:
            self._running.drop(places)
            drop_places(self._rows, places)
            drop_places(self._tokens, places)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _failed(self, jobs: Sequence[Job], error: Exception) -> None:
        """A pass over these jobs failed: a job by itself fails, several are tried again in smaller batches."""
        if not jobs:
            return
        alone = set(self._scheduler.failed([job.id for job in jobs]))
        if len(jobs) > len(alone):
            self.metrics.split(len(jobs))
            log_split(len(jobs), base_model=self._base.id, error=error)
        for job in jobs:
            if job.id in alone or isinstance(error, LoraHubError):
                self._end(job, "error", _explained(job, error))
            else:
                self._unplace(job)
        if self._base.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def _end(self, job: Job, outcome: Outcome, error: BaseException | None = None) -> None:
        """The job is over, in whatever way. Its row, if it runs, is dropped by the caller or here."""
        if job.over:
            return
        job.over = True
        self._loading.discard(job.id)
        self._scheduler.withdraw(job.id)
        if job.admitted is None:
            with self._lock:
                self._waiting -= 1
        self._unplace(job)
        if job.held is not None:
            job.held.release()
        timing = job.timing(monotonic())
        done, usage = job.row.done, Usage(len(job.prompt.ids), len(job.row.tokens))
        if outcome != "busy":
            self.metrics.request_done(outcome, timing, usage)
        log_request(
            job.id,
            outcome,
            base_model=self._base.id,
            route=job.request.route,
            tiers=job.tiers,
            timing=timing,
            usage=usage,
            error=error,
        )
        del self._jobs[job.id]  # not before: whoever is among them is told if the thread dies
        if error is not None:
            job.ticket.fail(error)
        elif done is not None:
            trace = Trace(job.request.route, job.widest, job.prompt.truncated, timing, job.tiers)
            job.ticket.resolve(
                Completion(done.text, done.finish_reason, usage, trace, done.tool_calls, done.invalid_tool_calls)
            )

    def _unplace(self, job: Job) -> None:
        if job.lora is not None:
            for digest in job.lora.terms.digests:
                self._pool.unpin(digest)
            job.lora = None

    def _distrust(self, job: Job) -> None:
        """Its adapters are not what was registered: they leave the pool as soon as nobody has them pinned."""
        digests = [adapter.digest for adapter in _adapters(job)]
        self._unplace(job)
        for digest in digests:
            self._pool.discard(digest)

    def _crashed(self, error: BaseException) -> None:
        """Nobody waits for a thread that is gone."""
        with self._lock:
            self._crash = error
            self._thread = None
            self._waiting = 0
        log_crash(error, base_model=self._base.id)
        while not self._inbox.empty():  # requests that it had not yet seen are among these
            message = self._inbox.get()
            if isinstance(message, partial) and message.func == self._take_in:
                self._jobs |= {job.id: job for job in message.args[0]}
            elif isinstance(message, partial) and message.func == self._loaded and isinstance(message.args[1], Held):
                message.args[1].release()
        jobs = list(self._jobs.values())
        for held in (self._jobs, self._rows, self._readings):
            held.clear()
        self._store.close()
        for job in jobs:
            if job.held is not None:
                job.held.release()
            job.ticket.fail(_crashed(error))

    def _state(self) -> EngineState:
        store = self._store.stats()
        return EngineState(
            waiting=self._waiting,
            running=len(self._rows),
            kv_places=len(self._rows) * self._running.width,
            max_kv_places=self._limits.max_tokens,
            base_bytes=self._base.size_bytes + self._base.packed_bytes,
            host=TierState(store.bytes, store.budget_bytes, store.held, store.evictions),
            device=TierState(self._pool.size_bytes, self._pool.budget_bytes, len(self._pool), self._pool.evictions),
        )


def _best(logits: Tensor) -> list[int | None]:
    """The token with the highest score of each row; None where scores are no numbers. One transfer for all rows."""
    values, tokens = logits.max(-1)  # not-a-number counts as the highest
    return [None if value != value else token for value, token in zip(values.tolist(), tokens.tolist(), strict=True)]


def _adapters(job: Job) -> list[Adapter]:
    """The different adapters of its route."""
    return list({member.adapter.digest: member.adapter for member in job.request.route.members}.values())


def _lora(job: Job) -> RowLora:
    assert job.lora is not None, "it was placed"
    return job.lora


def _late(job: Job) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the answer was not complete within timeout_s={job.request.timeout_s}; {len(job.row.tokens)} of at most "
        f"{job.request.sampling.max_new_tokens} tokens had come"
    )


def _crashed(error: BaseException) -> EngineCrashedError:
    crashed = EngineCrashedError(f"the engine's thread died ({type(error).__name__}: {error}); open the hub again")
    crashed.__cause__ = error
    return crashed


def _explained(job: Job, error: Exception) -> Exception:
    """The error that a caller gets for what went wrong with this job alone."""
    if isinstance(error, LoraHubError):
        return error
    found: GenerationError
    if _is_memory(error):
        found = EngineMemoryError(
            f"a prompt of {len(job.prompt.ids)} tokens with up to {job.request.sampling.max_new_tokens} new ones and "
            f"{0 if job.terms is None else job.terms.size} ranks of adapters does not fit into memory, even by itself"
        )
    else:
        found = GenerationError(f"the model failed on this prompt alone: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def _is_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
