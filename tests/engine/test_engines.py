"""The engines of a hub: made once, by one thread, while others go on; put out for want of room, and had again."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_hub_sdk.engine.base_model import ModelSettings, load_base_model
from lora_hub_sdk.engine.base_size import estimated_bytes
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.engines import Engines, Key, Making
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import ConfigurationError, DeadlineExceededError, EngineClosedError, ModelNotFoundError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_base
from lora_hub_sdk.types import Completion, Route, Sampling
from tests.encoders import Gate

KEY = ("base", ModelSettings())
ALONE = Route("base", "outputs")


class Maker:
    """Makes real engines of a tiny model, behind a gate; the first may fail, and files may tell another size."""

    def __init__(
        self, base: Path, error: Exception | None = None, *, key: Key = KEY, told: int | None = None, shut: bool = True
    ) -> None:
        self.gate = Gate()
        self._base, self._error, self._told = base, error, told
        self.making = Making(key, self._make, self._size)
        if not shut:
            self.gate.open()

    def _size(self) -> int:
        return size_of(self._base) if self._told is None else self._told

    def _make(self) -> Engine:
        self.gate()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return Engine(load_base_model(resolve_model(self._base)))


def size_of(base: Path) -> int:
    return estimated_bytes(base, ModelSettings())


def room(*bases: Path) -> int:
    """For these, and the little that no file tells of."""
    return sum(size_of(base) + 1024 for base in bases)


def itself(engine: Engine) -> Engine:
    return engine


async def aitself(engine: Engine) -> Engine:
    return engine


def get(engines: Engines, maker: Maker, timeout_s: float | None = None) -> Engine:
    return engines.use(maker.making, itself, lambda: timeout_s)


async def aget(engines: Engines, maker: Maker, timeout_s: float | None = None) -> Engine:
    return await engines.ause(maker.making, aitself, lambda: timeout_s)


def answer(engine: Engine) -> str:
    return engine.generate([Request("x", ALONE, Sampling(3))])[0].text


def names(engines: Engines) -> list[str]:
    return [name for name, _ in engines.staying()]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one size and one of about twice that."""
    folder = tmp_path_factory.mktemp("bases")
    small = [tiny_base(folder / f"base-{seed}", seed=seed) for seed in range(3)]
    return [*small, tiny_base(folder / "large", seed=3, layers=6)]


@pytest.fixture
def makers(bases: list[Path]) -> list[Maker]:
    return [Maker(base, key=(base.name, ModelSettings()), shut=False) for base in bases]


def test_all_who_ask_meanwhile_get_the_same(base: Path) -> None:
    engines, make = Engines(), Maker(base)

    async def ask() -> list[Engine]:
        return list(await asyncio.gather(*(aget(engines, make) for _ in range(5))))

    with ThreadPoolExecutor(6) as callers:
        asked = [callers.submit(get, engines, make) for _ in range(5)]
        tasks = callers.submit(lambda: asyncio.run(ask()))
        assert make.gate.reached.wait(60)
        assert engines.loaded() == []
        assert engines.staying() == []
        make.gate.open()
        found = {*tasks.result(60), *(each.result(60) for each in asked)}
    assert list(found) == engines.loaded()
    assert engines.staying() == [KEY]
    assert len(make.gate.calls) == 1
    engines.close()


def test_a_failure_is_for_those_who_waited_and_the_next_tries_again(base: Path) -> None:
    engines, make = Engines(), Maker(base, ModelNotFoundError("base", ["nowhere"]))
    with ThreadPoolExecutor(3) as callers:
        asked = [callers.submit(get, engines, make) for _ in range(2)]
        asked.append(callers.submit(lambda: asyncio.run(aget(engines, make))))
        assert make.gate.reached.wait(60)
        make.gate.open()
        failed = [each.exception(60) for each in asked]
    # Whoever came after the failure has an engine.
    assert any(isinstance(error, ModelNotFoundError) for error in failed)
    assert get(engines, make) in engines.loaded()
    engines.close()


def test_a_caller_who_leaves_takes_nothing_from_the_others(base: Path) -> None:
    engines, make = Engines(), Maker(base)

    async def leave() -> Engine:
        stays, leaves = (asyncio.create_task(aget(engines, make)) for _ in range(2))
        with pytest.raises(DeadlineExceededError, match="goes on loading"):
            await aget(engines, make, 0.01)
        leaves.cancel()
        await asyncio.wait([leaves])
        make.gate.open()
        return await stays

    assert [asyncio.run(leave())] == engines.loaded()
    engines.close()


def test_closing_lets_nobody_wait_and_keeps_nothing(base: Path) -> None:
    engines, make = Engines(), Maker(base)
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(get, engines, make)
        assert make.gate.reached.wait(60)
        engines.close()
        assert isinstance(asked.exception(60), EngineClosedError)
    make.gate.open()
    no_loads()
    assert engines.loaded() == []
    engines.close()
    with pytest.raises(EngineClosedError):
        get(engines, make)
    with pytest.raises(EngineClosedError):
        asyncio.run(aget(engines, make))


def no_loads() -> None:
    """Returns once no thread loads or unloads a model."""
    for thread in threading.enumerate():
        if thread.name in ("lora-hub-load-base", "lora-hub-unload-base"):
            thread.join(60)
            assert not thread.is_alive()


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [ModelSettings(), ModelSettings("bfloat16"), ModelSettings("float16")])
def test_files_tell_what_a_model_will_take(bases: list[Path], settings: ModelSettings) -> None:
    loaded = load_base_model(resolve_model(bases[3]), settings)
    taken = loaded.size_bytes + loaded.packed_bytes
    assert estimated_bytes(bases[3], settings) == pytest.approx(taken, rel=0.02)  # buffers are in no file


def test_a_model_that_never_fits_is_refused_before_anything_is_unloaded(makers: list[Maker], bases: list[Path]) -> None:
    engines = Engines(size_of(bases[3]) - 1)
    first = get(engines, makers[0])
    with pytest.raises(
        ConfigurationError, match=f"takes {size_of(bases[3]):,} bytes.*may take {size_of(bases[3]) - 1:,}"
    ):
        get(engines, makers[3])
    assert engines.loaded() == [first]
    assert makers[3].gate.calls == []
    engines.close()


def test_a_model_that_turns_out_to_be_too_large_is_let_go(bases: list[Path]) -> None:
    engines = Engines(size_of(bases[0]) // 2)
    with pytest.raises(ConfigurationError, match="now that it was loaded"):
        get(engines, Maker(bases[0], told=10, shut=False))
    no_loads()
    assert engines.loaded() == []
    engines.close()


# -- room --------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_make_room(makers: list[Maker], bases: list[Path]) -> None:
    engines = Engines(2 * room(bases[0]))
    get(engines, makers[0])
    get(engines, makers[1])
    get(engines, makers[0])
    get(engines, makers[2])
    assert names(engines) == ["base-0", "base-2"]
    get(engines, makers[1])
    assert names(engines) == ["base-2", "base-1"]
    assert [len(maker.gate.calls) for maker in makers[:3]] == [1, 2, 1]
    engines.close()


def test_without_a_bound_all_stay(makers: list[Maker]) -> None:
    engines = Engines()
    for maker in makers:
        get(engines, maker)
    assert len(engines.loaded()) == 4
    engines.close()


def test_no_more_go_than_have_to(makers: list[Maker], bases: list[Path]) -> None:
    """The small one goes first by age, but the large one has to go in any case and is enough."""
    engines = Engines(room(bases[0], bases[3]))
    get(engines, makers[0])
    get(engines, makers[3])
    second = Maker(bases[3], key=("large-2", ModelSettings()), shut=False)
    get(engines, second)
    assert names(engines) == ["base-0", "large-2"]
    engines.close()


def test_one_that_is_larger_than_its_files_told_makes_others_go_afterwards(bases: list[Path]) -> None:
    size = size_of(bases[0])
    engines = Engines(2 * room(bases[0]))
    for number, told in enumerate((size, size, 10)):
        get(engines, Maker(bases[number], key=(f"base-{number}", ModelSettings()), told=told, shut=False))
    no_loads()
    assert names(engines) == ["base-1", "base-2"]
    engines.close()


def test_one_that_answers_is_waited_for(makers: list[Maker], bases: list[Path], endless: Path) -> None:
    talker = Maker(endless, key=("endless", ModelSettings()), shut=False)
    engines = Engines(max(room(endless), room(bases[0])))
    long = Request("x", ALONE, Sampling(300))
    ticket = engines.use(talker.making, lambda engine: engine.submit(long))
    assert answer(get(engines, makers[0]))
    assert ticket.future.done(), "it was not closed before it had answered"
    assert ticket.result().usage.completion_tokens == 300
    assert names(engines) == ["base-0"]
    engines.close()


def test_an_idle_one_goes_before_one_that_answers(makers: list[Maker], bases: list[Path], endless: Path) -> None:
    talker = Maker(endless, key=("endless", ModelSettings()), shut=False)
    engines = Engines(2 * room(bases[0]))
    ticket = engines.use(talker.making, lambda engine: engine.submit(Request("x", ALONE, Sampling(30_000))))
    get(engines, makers[0])
    get(engines, makers[1])
    assert names(engines) == ["endless", "base-1"]
    assert not ticket.future.done()
    ticket.cancel()
    engines.close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import endless_base

    return endless_base(tmp_path_factory.mktemp("endless") / "base")


def test_a_caller_is_waited_for_who_has_not_handed_in_yet(makers: list[Maker], bases: list[Path]) -> None:
    engines, gate = Engines(room(bases[0])), Gate()

    def slowly(engine: Engine) -> str:
        gate()
        return answer(engine)

    with ThreadPoolExecutor(2) as callers:
        slow = callers.submit(engines.use, makers[0].making, slowly)
        assert gate.reached.wait(60)
        other = callers.submit(get, engines, makers[1])
        gate.open()
        assert slow.result(60)
        other.result(60)
    assert len(makers[0].gate.calls) == 1, "it was not closed under its caller"
    engines.close()


def test_a_blocked_event_loop_loses_its_engine_and_gets_it_again(makers: list[Maker], bases: list[Path]) -> None:
    """The loop's thread itself waits for the room that one of its tasks takes."""
    engines = Engines(room(bases[0]))
    asked: list[int] = []

    async def slowly(engine: Engine) -> str:
        asked.append(1)
        await asyncio.sleep(0)  # here the other task blocks the loop
        return (await engine.agenerate([Request("x", ALONE, Sampling(3))]))[0].text

    async def block() -> str:
        return engines.use(makers[1].making, answer)

    async def both() -> list[str]:
        get(engines, makers[0])  # so that the first does not have to wait
        return list(await asyncio.gather(engines.ause(makers[0].making, slowly), block()))

    assert all(asyncio.run(both()))
    assert len(asked) == 2
    engines.close()


def test_one_that_its_user_closed_is_made_again(makers: list[Maker]) -> None:
    engines = Engines()
    get(engines, makers[0]).close()
    assert engines.use(makers[0].making, answer)
    assert len(makers[0].gate.calls) == 2
    engines.close()


@pytest.mark.parametrize("rooms", [1, 2])
def test_many_threads_and_tasks_take_turns_where_not_all_fit(
    makers: list[Maker], bases: list[Path], rooms: int
) -> None:
    engines = Engines(rooms * room(bases[0]))
    seen: list[int] = []

    def ask(number: int) -> list[str]:
        answers = []
        for turn in range(6):
            answers.append(engines.use(makers[(number + turn) % 3].making, answer, lambda: 60.0))
            seen.append(sum(engine.base.size_bytes for engine in engines.loaded()))
        return answers

    async def aanswer(engine: Engine) -> str:
        return (await engine.agenerate([Request("x", ALONE, Sampling(3))]))[0].text

    async def aask(number: int) -> list[str]:
        return [await engines.ause(makers[(number + turn) % 3].making, aanswer, lambda: 60.0) for turn in range(6)]

    async def all_tasks() -> list[list[str]]:
        return list(await asyncio.gather(*(aask(number) for number in range(8))))

    with ThreadPoolExecutor(9) as callers:
        tasks = callers.submit(lambda: asyncio.run(all_tasks()))
        found = list(callers.map(ask, range(8)))
        found += tasks.result(120)
    expected = [answer(Engine(load_base_model(resolve_model(base)))) for base in bases[:3]]
    for number, answers in enumerate(found):
        assert answers == [expected[(number % 8 + turn) % 3] for turn in range(6)]
    assert max(seen) <= rooms * room(bases[0])
    # Whoever waits for a model gets it at once when it is there, so that not each of the 96 asks is a load.
    assert sum(len(maker.gate.calls) for maker in makers) < 60
    no_loads()
    assert len(engines.loaded()) <= rooms
    engines.close()


def test_the_time_of_a_caller_ends_while_it_waits_for_room(
    makers: list[Maker], bases: list[Path], endless: Path
) -> None:
    engines = Engines(max(room(endless), room(bases[0])))
    talker = Maker(endless, key=("endless", ModelSettings()), shut=False)
    ticket = engines.use(talker.making, lambda engine: engine.submit(Request("x", ALONE, Sampling(30_000))))
    with pytest.raises(DeadlineExceededError, match="was not loaded"):
        get(engines, makers[0], 0.05)
    with pytest.raises(DeadlineExceededError, match="was not loaded"):
        asyncio.run(aget(engines, makers[0], 0.05))
    ticket.cancel()
    assert answer(get(engines, makers[0]))
    engines.close()


def test_closing_ends_those_that_wait_for_room(makers: list[Maker], bases: list[Path], endless: Path) -> None:
    engines = Engines(max(room(endless), room(bases[0])))
    talker = Maker(endless, key=("endless", ModelSettings()), shut=False)
    ticket = engines.use(talker.making, lambda engine: engine.submit(Request("x", ALONE, Sampling(30_000))))
    with ThreadPoolExecutor(1) as caller:
        waiting = caller.submit(get, engines, makers[0])
        while names(engines):  # until the talker was told to go
            threading.Event().wait(0.001)
        engines.close(0.0)
        assert isinstance(waiting.exception(60), EngineClosedError)
    assert isinstance(ticket.future.exception(60), EngineClosedError)
    no_loads()


# -- unloading ---------------------------------------------------------------------------------------------------------


def gone(reference: Callable[[], object | None]) -> bool:
    """Nothing is collected here: unloading is to have done that."""
    return reference() is None


def test_what_was_unloaded_is_in_memory_no_more(makers: list[Maker], bases: list[Path]) -> None:
    engines = Engines(room(bases[0]))

    def used(maker: Maker) -> Callable[[], object | None]:
        engine = get(engines, maker)
        answer(engine)
        return weakref.ref(engine.base.model)

    first = used(makers[0])
    second = used(makers[1])  # takes the room of the first
    assert gone(first)
    assert engines.unload("base-1")
    assert gone(second)
    assert engines.loaded() == []
    assert not engines.unload("base-1")
    engines.close()


def test_whoever_reads_the_metrics_of_an_engine_keeps_no_model_in_memory(makers: list[Maker]) -> None:
    engines = Engines()
    metrics, model = engines.use(makers[0].making, lambda engine: (engine.metrics, weakref.ref(engine.base.model)))
    assert engines.unload("base-0")
    assert gone(model)
    assert metrics.stats().running == 0
    engines.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")
def test_the_memory_of_what_was_unloaded_goes_back_to_the_system(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tiny_base(tmp_path / "base")
    config = LlamaConfig.from_pretrained(base)
    for name, value in {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 10,
        "head_dim": 192,
    }.items():
        setattr(config, name, value)
    # Made wide as it is loaded, so that its weights are in memory of the C library's.
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    engines, maker = Engines(), Maker(base, key=("base", ModelSettings()), shut=False)
    engines.use(maker.making, answer)  # what is loaded with the first model stays
    engines.unload("base")
    before, stays = resident(), []
    for _ in range(2):
        engines.use(maker.making, answer)
        taken = resident() - before
        stays += [bytearray(3000) for _ in range(2000)]  # behind the model in memory, as what comes later always is
        engines.unload("base")
    assert taken > size_of(base) // 2
    assert resident() - before < taken // 2
    assert len(stays) == 4000
    engines.close()


def resident() -> int:
    """Bytes of memory that this process has."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stream_that_nobody_reads_on_keeps_no_model_in_memory(makers: list[Maker], ahead: bool) -> None:
    engines = Engines()
    ticket = engines.use(makers[0].making, lambda engine: engine.submit(Request("x", ALONE, Sampling(8)), stream=True))
    model = weakref.ref(engines.loaded()[0].base.model)
    pieces = ticket.pieces()
    read = [next(pieces)] if ahead else []
    assert engines.unload("base-0")
    assert gone(model)
    found = [*read, *pieces]
    texts, completion = found[:-1], found[-1]
    assert isinstance(completion, Completion)
    assert "".join(str(text) for text in texts) == completion.text
    engines.close()


def test_unloading_waits_for_one_that_is_loading(base: Path) -> None:
    engines, make = Engines(), Maker(base)
    with ThreadPoolExecutor(2) as callers:
        asked = callers.submit(engines.use, make.making, answer)
        assert make.gate.reached.wait(60)
        with pytest.raises(DeadlineExceededError, match="was not unloaded"):
            engines.unload("base", 0.01)
        unloading = callers.submit(engines.unload, "base")
        make.gate.open()
        assert asked.result(60)
        assert unloading.result(60)
    no_loads()
    assert engines.loaded() == []
    engines.close()


def test_whoever_asks_while_it_is_unloaded_has_it_again(makers: list[Maker], endless: Path) -> None:
    engines = Engines()
    talker = Maker(endless, key=("endless", ModelSettings()), shut=False)
    ticket = engines.use(talker.making, lambda engine: engine.submit(Request("x", ALONE, Sampling(30_000))))
    with pytest.raises(DeadlineExceededError):
        engines.unload("endless", 0.01)
    with ThreadPoolExecutor(1) as caller:
        again = caller.submit(engines.use, talker.making, answer)
        with pytest.raises(TimeoutError):
            again.exception(0.05)  # the memory of the first is not free yet
        assert len(talker.gate.calls) == 1
        ticket.cancel()
        assert again.result(60)
    assert len(talker.gate.calls) == 2
    engines.close()
