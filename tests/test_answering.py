"""A hub that many callers ask at once, from threads and asyncio: what they share, and how calls end early."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk import EngineSettings, errors
from lora_hub_sdk.engine import base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.prompt import EncodedPrompt, PromptEncoder
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Conversation, Message, Piece
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Completion, Constraint, Routing, Sampling
from tests.encoders import Gate, Hashing
from tests.support import endless_base

SAMPLES = {
    "french": ["Translate into French: good morning", "How do you say thanks in French?"],
    "maths": ["What is 12 + 30?", "Add 4 and 9."],
    "poems": ["Write a poem about the sea", "Compose a short rhyme"],
}
SHORT = Sampling(4)
#: Would take minutes; whoever asks for it gives it up.
ENDLESS = Sampling(30_000)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that talks for minutes."""
    return endless_base(tmp_path_factory.mktemp("base") / "wide")


@pytest.fixture
def fill(base: Path, tmp_path: Path) -> Callable[..., LoraHub]:
    """Registers three adapters of a base model in a hub."""

    def fill(hub: LoraHub, of: Path = base) -> LoraHub:
        for seed, (name, samples) in enumerate(SAMPLES.items()):
            hub.register(tiny_adapter(tmp_path / of.name / name, of, seed=seed, rank=seed + 2), samples=samples)
        return hub

    return fill


@pytest.fixture
def pool(hub: LoraHub, fill: Callable[..., LoraHub]) -> LoraHub:
    return fill(hub)


@pytest.fixture
def talker(hub: LoraHub, fill: Callable[..., LoraHub], wide_base: Path) -> tuple[LoraHub, Engine]:
    """A hub and its loaded engine, whose answers never end by themselves."""
    return hub, fill(hub, wide_base).engine(wide_base)


@pytest.fixture
def gated(open_hub: Callable[..., LoraHub], fill: Callable[..., LoraHub]) -> Iterator[tuple[LoraHub, Gate]]:
    """A hub whose encoder waits for a gate."""
    gate = Gate()
    doors: list[Callable[[object], None]] = []
    hub = fill(open_hub(encoder=Hashing("one", lambda texts: [door(texts) for door in doors])))
    doors.append(gate)
    yield hub, gate
    gate.open()


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Base models wait for this gate before they are loaded."""
    gate, load = Gate(), base_model.load_base_model

    def wait_and_load(resolved: Any, settings: Any = None) -> Any:
        gate(resolved.id)
        return load(resolved, settings)

    monkeypatch.setattr(base_model, "load_base_model", wait_and_load)
    yield gate
    gate.open()


@asynccontextmanager
async def opened_by_ticks(gate: Gate, count: int = 50) -> AsyncIterator[None]:
    """The event loop opens the gate, some rounds after somebody came to it; one that is held up never does."""

    async def tick() -> None:
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        for _ in range(count):
            await asyncio.sleep(0)
        gate.open()

    ticking = asyncio.create_task(tick())
    yield
    await ticking


def eventually(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until, "it never came to be so"
        time.sleep(0.002)


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


# -- options for each prompt ----------------------------------------------------------------------------------------


def test_each_prompt_of_a_batch_has_its_own_routing_and_sampling(pool: LoraHub, base: Path) -> None:
    prompts = [f"Add {number} and 4" for number in range(8)]
    routing = [
        Routing("selection"),
        Routing("mixture", k=2),
        Routing("fusion", k=3, weights="similarity"),
        Routing("base"),
        Routing("selection", adapters=("poems",)),
        Routing("selection", exclude=("maths",)),
        Routing("selection", min_score=0.999),
        Routing("selection"),
    ]
    sampling = [Sampling(3 + place, 1.0 if place % 2 else 0.0, seed=place) for place in range(8)]
    alone = [
        pool.generate([prompt], base_model=base, routing=how, sampling=chosen)[0]
        for prompt, how, chosen in zip(prompts, routing, sampling, strict=True)
    ]
    together = pool.generate(prompts, base_model=base, routing=routing, sampling=sampling)
    assert texts(together) == texts(alone)
    assert [each.trace.route for each in together] == [each.trace.route for each in alone]
    assert texts(asyncio.run(pool.agenerate(prompts, base_model=base, routing=routing, sampling=sampling))) == texts(
        alone
    )
    assert {each.trace.batch_size for each in together} == {8}
    assert pool.route(prompts, base_model=base, routing=routing) == [each.trace.route for each in alone]
    names = [[member.adapter.name for member in each.trace.route.members] for each in together]
    assert [len(found) for found in names] == [1, 2, 3, 0, 1, 1, 0, 1]
    assert names[0] == names[7] == ["maths"]
    assert names[4] == ["poems"]
    assert "maths" not in names[5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": [Routing()]}, "routing has 1 values for 2 prompts"),
        ({"routing": []}, "routing has 0 values"),
        ({"routing": "mixture"}, "expected Routing"),
        ({"routing": [Routing(), None]}, "expected Routing"),
        ({"routing": [Routing(), Routing(k=0)]}, "k=0"),
        ({"sampling": [Sampling()] * 3}, "sampling has 3 values for 2 prompts"),
        ({"sampling": [Sampling(), 4]}, "expected Sampling"),
        ({"sampling": [Sampling(), Sampling(0)]}, "max_new_tokens=0"),
        ({"timeout_s": [1.0]}, "timeout_s has 1 values"),
        ({"timeout_s": [1.0, 0.0]}, "timeout_s=0.0"),
        ({"timeout_s": -1}, "timeout_s=-1"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"timeout_s": "5"}, "expected float"),
    ],
)
def test_options_that_do_not_fit_the_prompts_are_refused(
    pool: LoraHub, base: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.ConfigurationError, match=message):
        pool.generate(["one", "two"], base_model=base, **options)
    with pytest.raises(errors.ConfigurationError, match=message):
        asyncio.run(pool.agenerate(["one", "two"], base_model=base, **options))


def test_nothing_is_routed_where_one_routing_is_wrong(gated: tuple[LoraHub, Gate], base: Path) -> None:
    hub, gate = gated
    with pytest.raises(errors.ConfigurationError, match="k=0"):
        hub.generate(["one", "two"], base_model=base, routing=[Routing(), Routing(k=0)])
    assert gate.calls == []


def test_an_error_tells_the_prompts_place_whatever_its_routing(pool: LoraHub, base: Path) -> None:
    routing = [Routing("base"), Routing(), Routing("base"), Routing(k=2)]
    with pytest.raises(errors.EmptyPromptError) as empty:
        pool.generate(["a", "b", "c", " "], base_model=base, routing=routing)
    assert empty.value.row == 3
    with pytest.raises(errors.PromptTooLongError) as long:
        pool.generate(["a", "b", "long " * 500, "d"], base_model=base, routing=routing, overflow="refuse")
    assert long.value.row == 2


def test_no_prompts_need_no_engine(pool: LoraHub, base: Path) -> None:
    assert pool.generate([], base_model=base) == []
    assert asyncio.run(pool.agenerate([], base_model=base)) == []
    assert pool.stats() == []


# -- many callers ---------------------------------------------------------------------------------------------------


def test_threads_that_ask_at_once_are_routed_together(gated: tuple[LoraHub, Gate], base: Path) -> None:
    hub, gate = gated
    started = threading.Barrier(33)

    def ask(number: int) -> str:
        started.wait(60)
        (completion,) = hub.generate([f"prompt {number}"], base_model=base, sampling=SHORT)
        return completion.text

    with ThreadPoolExecutor(32) as callers:
        answers = [callers.submit(ask, number) for number in range(32)]
        started.wait(60)
        assert gate.reached.wait(60)
        waiting = hub._desk._searches._waiting
        eventually(lambda: len(gate.calls[0]) + sum(len(calls) for calls in list(waiting.values())) == 32)
        gate.open()
        found = [answer.result(60) for answer in answers]
    assert len(gate.calls) <= 2, "the first, then all who came meanwhile"
    assert found == [hub.generate([f"prompt {n}"], base_model=base, sampling=SHORT)[0].text for n in range(32)]


def test_tasks_that_ask_at_once_share_batches_and_never_hold_up_the_loop(
    gated: tuple[LoraHub, Gate], loading: Gate, base: Path
) -> None:
    hub, gate = gated

    async def ask() -> list[list[Completion]]:
        async with opened_by_ticks(gate), opened_by_ticks(loading):
            asked = [hub.agenerate([f"prompt {n}"], base_model=base, sampling=SHORT) for n in range(32)]
            return await asyncio.gather(*asked)

    found = asyncio.run(ask())
    assert len(gate.calls) <= 2
    assert loading.calls == [str(base)], "it was loaded once"
    assert [each.text for (each,) in found] == texts(
        hub.generate([f"prompt {n}" for n in range(32)], base_model=base, sampling=SHORT)
    )


def test_an_asynchronous_stream_has_the_pieces_of_the_other(pool: LoraHub, base: Path) -> None:
    async def collect() -> list[Piece | Completion]:
        return [piece async for piece in pool.astream("Add 3 and 4", base_model=base, sampling=Sampling(12))]

    pieces = asyncio.run(collect())
    assert isinstance(pieces[-1], Completion)
    assert "".join(map(str, pieces[:-1])) == pieces[-1].text
    assert pieces == list(pool.stream("Add 3 and 4", base_model=base, sampling=Sampling(12)))


def test_a_prompt_of_a_megabyte_does_not_hold_up_the_loop(
    pool: LoraHub, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, encode = Gate(), PromptEncoder.encode
    engine = pool.engine(base)
    (route,) = pool.route(["short"], base_model=base)

    def wait_and_encode(self: PromptEncoder, prompt: str, **options: Any) -> EncodedPrompt:
        if len(prompt) > 1000:
            gate()
        return encode(self, prompt, **options)

    monkeypatch.setattr(PromptEncoder, "encode", wait_and_encode)

    async def ask() -> tuple[list[Completion], list[Completion]]:
        long = asyncio.create_task(pool.agenerate(["long " * 200_000], base_model=base, sampling=SHORT))
        while not gate.reached.is_set():
            await asyncio.sleep(0)
        # Nor does a short prompt that comes while the tokenizer is in use.
        short = asyncio.create_task(engine.agenerate([Request("short", route, SHORT)]))
        for _ in range(50):
            await asyncio.sleep(0)
        gate.open()
        return await short, await long

    short, long = asyncio.run(ask())
    assert (len(short), len(long)) == (1, 1)
    assert long[0].trace.truncated_tokens > 100_000


def test_an_asynchronous_call_may_have_more_prompts_than_may_wait(
    open_hub: Callable[..., LoraHub], fill: Callable[..., LoraHub], base: Path
) -> None:
    hub = fill(open_hub(engines=EngineSettings(EngineLimits(max_rows=3, max_waiting=4))))
    prompts = [f"Add {number} and 1" for number in range(30)]
    expected = hub.generate(prompts, base_model=base, sampling=SHORT)
    assert texts(asyncio.run(hub.agenerate(prompts, base_model=base, sampling=SHORT))) == texts(expected)
    assert max(completion.trace.batch_size for completion in expected) == 3


# -- ends -----------------------------------------------------------------------------------------------------------


Talker = tuple[LoraHub, Engine]
TWO = ["Add 3 and 4", "Say thanks"]


def test_cancelling_a_task_frees_its_rows(talker: Talker, wide_base: Path) -> None:
    hub, engine = talker

    async def cancel() -> None:
        asked = asyncio.create_task(hub.agenerate(TWO, base_model=wide_base, sampling=ENDLESS))
        while engine.stats().running < 2:
            await asyncio.sleep(0.002)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(cancel())
    eventually(lambda: engine.stats().running == 0)
    assert engine.stats().requests["cancelled"] == 2


@pytest.mark.parametrize("kind", ["stream", "astream"])
def test_leaving_a_stream_frees_its_row(talker: Talker, wide_base: Path, kind: str) -> None:
    hub, engine = talker

    async def leave() -> None:
        pieces = hub.astream(TWO[0], base_model=wide_base, sampling=ENDLESS)
        assert await anext(pieces)
        await pieces.aclose()

    if kind == "astream":
        asyncio.run(leave())
    else:
        pieces = hub.stream(TWO[0], base_model=wide_base, sampling=ENDLESS)
        assert next(pieces)
        pieces.close()
    eventually(lambda: engine.stats().requests["cancelled"] == 1)
    eventually(lambda: engine.stats().running == 0)


def test_a_deadline_counts_the_routing(gated: tuple[LoraHub, Gate], base: Path) -> None:
    hub, _ = gated
    with pytest.raises(errors.DeadlineExceededError, match="no routes"):
        hub.generate(["a", "b"], base_model=base, timeout_s=[None, 0.02])
    with pytest.raises(errors.DeadlineExceededError, match="no routes"):
        asyncio.run(hub.agenerate(["a"], base_model=base, timeout_s=0.02))
    with pytest.raises(errors.DeadlineExceededError):
        next(hub.stream("a", base_model=base, timeout_s=0.02))


def test_a_deadline_counts_the_loading_which_goes_on(pool: LoraHub, loading: Gate, base: Path) -> None:
    plain: dict[str, Any] = {"base_model": base, "routing": Routing("base"), "sampling": SHORT}
    with pytest.raises(errors.DeadlineExceededError, match="goes on loading"):
        pool.generate(["a"], timeout_s=0.2, **plain)
    with pytest.raises(errors.DeadlineExceededError, match="goes on loading"):
        asyncio.run(pool.agenerate(["a"], timeout_s=0.2, **plain))
    loading.open()
    assert pool.generate(["a"], timeout_s=60, **plain)
    assert len(loading.calls) == 1


def test_a_deadline_ends_the_row_that_has_it_and_gives_up_its_call(talker: Talker, wide_base: Path) -> None:
    hub, engine = talker
    with pytest.raises(errors.DeadlineExceededError, match="tokens had come"):
        hub.generate(TWO, base_model=wide_base, sampling=ENDLESS, timeout_s=[None, 1.0])
    eventually(lambda: engine.stats().running == 0)
    assert engine.stats().requests["deadline"] == engine.stats().requests["cancelled"] == 1
    assert hub.generate(TWO, base_model=wide_base, sampling=SHORT, timeout_s=60)


def test_closing_answers_what_was_handed_in_and_refuses_the_rest(pool: LoraHub, base: Path) -> None:
    prompts = [f"Add {number} and 4" for number in range(24)]
    expected = pool.generate(prompts, base_model=base, sampling=Sampling(60))
    engine = pool.engine(base)
    eventually(lambda: not engine.stats().running)  # a row is let go of a moment after its answer
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(pool.generate, prompts, base_model=base, sampling=Sampling(60))
        eventually(lambda: engine.stats().running)
        pool.close()
        assert texts(asked.result(60)) == texts(expected)
    for ask in (pool.generate, lambda *a, **k: asyncio.run(pool.agenerate(*a, **k))):
        with pytest.raises(errors.EngineClosedError):
            ask(["x"], base_model=base)


def test_closing_with_a_time_gives_up_what_takes_longer(talker: Talker, wide_base: Path) -> None:
    hub, engine = talker
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(hub.generate, TWO, base_model=wide_base, sampling=ENDLESS)
        eventually(lambda: engine.stats().running)
        hub.close(timeout_s=0.05)
        with pytest.raises(errors.EngineClosedError):
            asked.result(60)


# -- engines --------------------------------------------------------------------------------------------------------


def test_a_base_model_that_is_loading_holds_up_no_other(
    pool: LoraHub, loading: Gate, base: Path, wide_base: Path
) -> None:
    loading.open()
    expected = texts(pool.generate(["Add 3 and 4"], base_model=base, sampling=SHORT))
    loading.shut()
    with ThreadPoolExecutor(3) as callers:
        asked = [callers.submit(pool.engine, wide_base) for _ in range(3)]
        assert loading.reached.wait(60)
        assert texts(pool.generate(["Add 3 and 4"], base_model=base, sampling=SHORT)) == expected
        assert [stats.base_model for stats in pool.stats()] == [str(base)]
        loading.open()
        (engine,) = {each.result(60) for each in asked}
    assert engine is pool.engine(wide_base)
    assert loading.calls == [str(wide_base)]


def test_settings_bound_every_engine(
    open_hub: Callable[..., LoraHub], fill: Callable[..., LoraHub], base: Path
) -> None:
    hub = fill(open_hub(engines=EngineSettings(EngineLimits(max_rows=2), host_bytes=0, device_bytes=1 << 16)))
    answers = hub.generate(["Add 3 and 4"] * 5, base_model=base, sampling=SHORT)
    assert {answer.trace.batch_size for answer in answers} <= {1, 2}
    (stats,) = hub.stats()
    assert (stats.host.budget_bytes, stats.host.adapters) == (0, 0)
    assert stats.device.budget_bytes == 1 << 16


def test_metrics_have_all_engines_on_one_page(pool: LoraHub, base: Path, wide_base: Path) -> None:
    assert (pool.metrics(), pool.stats()) == ("", [])
    for of in (base, wide_base):
        pool.generate(["x"], base_model=of, routing=Routing("base"), sampling=SHORT)
    page = pool.metrics()
    for of in (base, wide_base):
        assert f'lora_hub_engine_requests_total{{base_model="{of}",outcome="length"}} 1.0' in page
    assert page.count("# TYPE lora_hub_engine_waiting gauge") == 1
    assert [stats.base_model for stats in pool.stats()] == [str(base), str(wide_base)]


def test_engines_forget_content_that_no_adapter_has_any_more(
    open_hub: Callable[..., LoraHub], pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    shared = tmp_path / base.name / "poems"
    pool.register(shared, name="again", namespace="other", samples=SAMPLES["poems"])

    def held() -> tuple[int, int]:
        pool.generate(["x"], base_model=base, routing=Routing("base"), sampling=SHORT)  # lets the engine do its part
        (stats,) = pool.stats()
        return stats.host.adapters, stats.device.adapters

    pool.generate(["Add 3 and 4"], base_model=base, routing=Routing("mixture", k=3), sampling=SHORT)
    assert held() == (3, 3)
    pool.remove("poems")
    assert held() == (3, 3), "another adapter has the same content"
    pool.remove("again", namespace="other")
    assert held() == (2, 2)
    tiny_adapter(tmp_path / base.name / "maths", base, seed=40)
    pool.update("maths")
    assert held() == (1, 1)
    open_hub().remove("french")  # as another process would
    assert held() == (1, 1)
    pool.gc(dry_run=True)
    assert held() == (1, 1)
    pool.gc()
    assert held() == (0, 0)


def test_a_conversation_is_routed_by_what_the_user_said_last(pool: LoraHub, base: Path) -> None:
    talk = [
        Message("system", "Compose poems."),
        Message("user", "Translate into French: good morning"),
        Message("assistant", "Bonjour"),
        Message("user", "Add 4 and 9."),
    ]
    one, everything = Conversation.of(talk), Conversation.of(talk, search_by="all")
    routing = Routing(strategy="selection")
    (route,) = pool.route([one], base_model=base, routing=routing)
    assert [member.adapter.name for member in route.members] == ["maths"]
    both = pool.generate([one, "Add 4 and 9."], base_model=base, routing=routing, sampling=SHORT)
    assert [answer.trace.route for answer in both] == [route, route]
    assert both[0].usage.prompt_tokens > both[1].usage.prompt_tokens
    (found,) = asyncio.run(pool.agenerate([one], base_model=base, routing=routing, sampling=SHORT))
    assert found.text == both[0].text
    *pieces, answer = pool.stream(one, base_model=base, routing=routing, sampling=SHORT)
    assert isinstance(answer, Completion)
    assert "".join(map(str, pieces)) == answer.text == both[0].text
    assert pool.route([everything], base_model=base) == pool.route([everything.search_text], base_model=base)


def test_a_constraint_holds_the_answers_of_a_hub_alone_and_beside_others(pool: LoraHub, base: Path) -> None:
    held = Sampling(20, constraint=Constraint("regex", "[0-9]{1,3}"))
    prompts = ["Add 4 and 9.", "Write a poem", "What is 1 + 1?"]
    answers = pool.generate(prompts, base_model=base, sampling=[held, SHORT, held])
    assert [re.fullmatch("[0-9]{1,3}", answer.text) is not None for answer in answers] == [True, False, True]
    alone = pool.generate(prompts[:1], base_model=base, sampling=held)
    assert texts(alone) == texts(answers[:1])


def test_a_models_context_is_known_without_loading_it(pool: LoraHub, base: Path) -> None:
    assert pool.context(base) == 256
    assert pool.loaded_bases() == ()
    assert pool.engine(base).base.context == 256
