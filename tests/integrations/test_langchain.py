"""LoraRetrieverLLM as a LangChain citizen, on a tiny random model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_lora_hub import ChatLoraRetriever, LoraRetrieverLLM

from lora_hub_sdk import EngineSettings
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EmptyPromptError,
    NoAdaptersError,
    UnknownStrategyError,
)
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Route
from tests.encoders import Gate, Hashing
from tests.support import endless_base

TASKS = {
    "french": ["Translate into French: good morning", "How do you say thanks in French?"],
    "maths": ["What is 12 + 30?", "Add 4 and 9."],
    "poems": ["Write a poem about the sea", "Compose a short rhyme"],
}
PROMPTS: list[Any] = [f"{text} ({place})" for place in range(6) for texts in TASKS.values() for text in texts][:16]


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    for seed, (name, samples) in enumerate(TASKS.items()):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed, rank=seed + 2), samples=samples)
    return hub


@pytest.fixture
def llm(pool: LoraHub, base: Path) -> LoraRetrieverLLM:
    return LoraRetrieverLLM(hub=pool, base_model=str(base), max_new_tokens=6)


def test_it_runs_in_a_chain(llm: LoraRetrieverLLM) -> None:
    chain = PromptTemplate.from_template("Please: {task}") | llm | StrOutputParser()
    answer = chain.invoke({"task": "add 3 and 4"})
    assert answer == llm.invoke("Please: add 3 and 4")
    assert chain.batch([{"task": "add 3 and 4"}, {"task": "rhyme"}])[0] == answer


def test_sixteen_prompts_are_one_engine_batch(llm: LoraRetrieverLLM, pool: LoraHub, base: Path) -> None:
    engine = pool.engine(base)
    answers = llm.batch(PROMPTS)
    assert engine.batches == 1
    order = [(7 * place) % 16 for place in range(16)]
    turned = llm.batch([PROMPTS[place] for place in order])
    assert [turned[order.index(place)] for place in range(16)] == answers
    assert len(set(answers)) > 3
    assert asyncio.run(llm.abatch(PROMPTS)) == answers
    assert engine.batches == 3
    assert asyncio.run(llm.ainvoke(PROMPTS[3])) == answers[3]


@pytest.mark.parametrize("strategy", ["selection", "mixture", "fusion"])
def test_every_generation_tells_its_route(llm: LoraRetrieverLLM, pool: LoraHub, strategy: str) -> None:
    result = llm.generate(["Say hello in French", "5 + 6"], strategy=strategy, k=2)
    for (generation,), nearest in zip(result.generations, ("french", "maths"), strict=True):
        info: dict[str, Any] = generation.generation_info or {}
        route = info["route"]
        assert route["strategy"] == strategy
        assert len(route["adapters"]) == (1 if strategy == "selection" else 2)
        first = route["adapters"][0]
        assert first["name"] == nearest
        assert first["revision"] == pool.get(nearest).revision
        assert sum(adapter["weight"] for adapter in route["adapters"]) == pytest.approx(1.0)
        assert first["score"] == max(adapter["score"] for adapter in route["adapters"])
        usage = info["token_usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    usage = (result.llm_output or {})["token_usage"]
    assert usage["completion_tokens"] <= 12


def test_a_generation_tells_where_its_adapters_were_and_where_its_time_went(llm: LoraRetrieverLLM) -> None:
    def info(**given: Any) -> dict[str, Any]:
        return llm.generate(["Add 3 and 4"], **given).generations[0][0].generation_info or {}

    fresh, again, bare = info(), info(), info(strategy="base")
    assert fresh["tiers"] == ["disk"] * len(fresh["route"]["adapters"])
    assert len(again["tiers"]) == len(fresh["tiers"])
    assert "disk" not in again["tiers"]
    assert bare["tiers"] == []
    for timing in (fresh["timing"], again["timing"], bare["timing"]):
        assert 0 < timing["first_token_s"] <= timing["total_s"]
        assert timing["queue_s"] + timing["prefill_s"] + timing["decode_s"] <= timing["total_s"] + 1e-6
    assert json.loads(json.dumps(fresh)) == fresh


def test_the_base_model_answers_only_where_it_was_asked_to(llm: LoraRetrieverLLM) -> None:
    (generation,) = llm.generate(["zebra crossing"], min_score=0.99).generations[0]
    assert (generation.generation_info or {})["route"]["adapters"] == []
    assert generation.text == llm.invoke("zebra crossing", strategy="base")
    assert generation.text != llm.invoke("zebra crossing", adapters=("maths",))


def test_streaming_gives_the_same_text_and_the_route_at_its_end(llm: LoraRetrieverLLM) -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []
            self.info: dict[str, Any] = {}

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.seen.append(token)

        def on_llm_end(self, response: Any, **_: Any) -> None:
            self.info = response.generations[0][0].generation_info

    tokens = Tokens()
    pieces = list(llm.stream("Add 3 and 4", config={"callbacks": [tokens]}))
    assert "".join(pieces) == "".join(tokens.seen) == llm.invoke("Add 3 and 4")
    assert tokens.info["route"]["adapters"][0]["name"] == "maths"

    async def collect() -> list[str]:
        return [piece async for piece in llm.astream("Add 3 and 4")]

    assert asyncio.run(collect()) == pieces


def test_stop_seed_and_temperature(llm: LoraRetrieverLLM) -> None:
    text = llm.invoke("Add 3 and 4", max_new_tokens=20)
    assert llm.invoke("Add 3 and 4", max_new_tokens=20, stop=[text[3:5]]) == text[: text.index(text[3:5])]
    warm: dict[str, Any] = {"temperature": 1.5, "max_new_tokens": 20}
    assert llm.invoke("Add 3 and 4", seed=1, **warm) == llm.invoke("Add 3 and 4", seed=1, **warm)
    assert llm.invoke("Add 3 and 4", seed=1, **warm) != llm.invoke("Add 3 and 4", seed=2, **warm)


def test_the_cache_is_never_stale(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    llm = LoraRetrieverLLM(
        hub=pool, base_model=str(base), max_new_tokens=4, cache=InMemoryCache(), strategy="selection"
    )
    engine = pool.engine(base)
    llm.invoke("Add 3 and 4")
    llm.invoke("Add 3 and 4")
    assert engine.batches == 1
    llm.model_copy(update={"strategy": "mixture"}).invoke("Add 3 and 4")
    assert engine.batches == 2
    pool.register(tiny_adapter(tmp_path / "sums", base, seed=9), samples=["Add 3 and 4"])
    answer = llm.generate(["Add 3 and 4"])
    assert engine.batches == 3
    assert (answer.generations[0][0].generation_info or {})["route"]["adapters"][0]["name"] == "sums"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"strategy": "soup"}, UnknownStrategyError),
        ({"k": 0}, ConfigurationError),
        ({"weights": "odd"}, ConfigurationError),
        ({"temperature": -1.0}, ConfigurationError),
        ({"max_new_tokens": 0}, ConfigurationError),
        ({"timeout_s": 0.0}, ConfigurationError),
        ({"adapters": ()}, ConfigurationError),
        ({"strategi": "mixture"}, ValueError),
        ({"dtype": "float8"}, ValueError),
    ],
)
def test_fields_that_make_no_sense_are_refused_at_once(
    pool: LoraHub, base: Path, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        LoraRetrieverLLM(hub=pool, base_model=str(base), **fields)


def test_calls_that_make_no_sense_are_refused(llm: LoraRetrieverLLM) -> None:
    with pytest.raises(ConfigurationError, match="colour"):
        llm.invoke("x", colour="red")
    with pytest.raises(UnknownStrategyError):
        llm.invoke("x", strategy="soup")
    with pytest.raises(EmptyPromptError):
        llm.batch(["fine", ""])


def test_an_empty_registry_is_an_error(hub: LoraHub, base: Path) -> None:
    with pytest.raises(NoAdaptersError):
        LoraRetrieverLLM(hub=hub, base_model=str(base)).invoke("x")


def test_a_prompt_that_fails_takes_no_other_with_it(llm: LoraRetrieverLLM) -> None:
    asked: list[Any] = ["fine", "", "Add 3 and 4"]
    for found in (
        llm.batch(asked, return_exceptions=True),
        asyncio.run(llm.abatch(asked, return_exceptions=True)),
        [answer for _, answer in sorted(llm.batch_as_completed(asked, return_exceptions=True))],
    ):
        assert [found[0], found[2]] == llm.batch(["fine", "Add 3 and 4"])
        assert isinstance(found[1], EmptyPromptError)


def test_what_is_given_for_one_call_is_part_of_the_caches_key(pool: LoraHub, base: Path) -> None:
    llm = LoraRetrieverLLM(hub=pool, base_model=str(base), max_new_tokens=6, cache=InMemoryCache())
    plain = LoraRetrieverLLM(hub=pool, base_model=str(base), max_new_tokens=6, cache=False)
    calls: list[dict[str, Any]] = [{}, {"adapters": ("maths",)}, {"adapters": ("french",)}, {"max_new_tokens": 2}, {}]
    for call in calls:
        assert llm.invoke("Say something", **call) == plain.invoke("Say something", **call)
        assert asyncio.run(llm.ainvoke("Say something", **call)) == plain.invoke("Say something", **call)


def test_an_answer_does_not_outlive_a_change_of_reranking(pool: LoraHub, base: Path) -> None:
    engine = pool.engine(base)
    llm = LoraRetrieverLLM(hub=pool, base_model=str(base), max_new_tokens=2, cache=InMemoryCache())
    for rerank in (None, True, False):
        other = llm.model_copy(update={"rerank": rerank})
        before = engine.batches
        other.invoke("Add 3 and 4")
        assert engine.batches == before + 1
        other.invoke("Add 3 and 4")
        llm.invoke("Add 3 and 4", rerank=rerank)
        assert engine.batches == before + 1
    with pytest.raises(ConfigurationError, match="rerank"):
        llm.invoke("Add 3 and 4", rerank="no")


def test_the_config_of_a_call_sets_its_namespace(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    for seed, namespace in enumerate(("ann", "bob")):
        folder = tiny_adapter(tmp_path / namespace, base, seed=20 + seed)
        pool.register(folder, samples=TASKS["french"], name="french", namespace=namespace)

    def alone(namespace: str) -> str:
        # A cache must not give one namespace's answer to another, so it is on in the model and off here.
        return LoraRetrieverLLM(
            hub=pool, base_model=str(base), namespace=namespace, max_new_tokens=6, cache=False
        ).invoke("Please: thanks")

    llm = LoraRetrieverLLM(hub=pool, base_model=str(base), max_new_tokens=6, cache=InMemoryCache())
    chain = PromptTemplate.from_template("Please: {task}") | llm | StrOutputParser()
    configs: list[Any] = [{"configurable": {"namespace": name}} for name in ("ann", "bob", "default")]
    expected = [alone(name) for name in ("ann", "bob", "default")]
    assert len(set(expected)) == 3
    for _ in range(2):
        assert [chain.invoke({"task": "thanks"}, config) for config in configs] == expected
        assert chain.batch([{"task": "thanks"}] * 3, configs) == expected
        assert asyncio.run(chain.abatch([{"task": "thanks"}] * 3, configs)) == expected
        assert [asyncio.run(chain.ainvoke({"task": "thanks"}, config)) for config in configs] == expected
        assert ["".join(chain.stream({"task": "thanks"}, config)) for config in configs] == expected
    engine = pool.engine(base)
    before = engine.batches
    fresh: list[Any] = [{"task": f"thanks {number}"} for number in range(4)]
    chain.batch(fresh, [configs[number % 2] for number in range(4)])
    assert engine.batches == before + 1, "namespaces share the engine's batches"
    with pytest.raises(NoAdaptersError, match="nobody"):
        chain.invoke({"task": "thanks"}, {"configurable": {"namespace": "nobody"}})


def test_explain_tells_the_route_without_an_answer(llm: LoraRetrieverLLM, pool: LoraHub, base: Path) -> None:
    engine = pool.engine(base)
    route = llm.explain("Add 3 and 4", strategy="fusion", k=2)
    assert route == asyncio.run(llm.aexplain("Add 3 and 4", strategy="fusion", k=2))
    assert engine.batches == 0
    told = llm.generate(["Add 3 and 4"], strategy="fusion", k=2).generations[0][0].generation_info or {}
    assert told["route"] == route.as_dict()
    with pytest.raises(NoAdaptersError, match="nobody"):
        llm.explain("Add 3 and 4", {"configurable": {"namespace": "nobody"}})


def test_fields_can_be_configured(llm: LoraRetrieverLLM, pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.register(tiny_adapter(tmp_path / "ann", base, seed=20), samples=TASKS["french"], name="hers", namespace="ann")
    names = ("k", "strategy", "namespace", "max_new_tokens")
    open_to = llm.configurable_fields(**{name: ConfigurableField(name) for name in names})
    config: Any = {"configurable": {"k": 1, "strategy": "selection", "namespace": "ann", "max_new_tokens": 3}}
    own = LoraRetrieverLLM(
        hub=pool, base_model=str(base), k=1, strategy="selection", namespace="ann", max_new_tokens=3
    ).invoke("Say thanks")
    assert open_to.invoke("Say thanks", config) == own != open_to.invoke("Say thanks")
    assert open_to.batch(["Say thanks"] * 2, config) == asyncio.run(open_to.abatch(["Say thanks"] * 2, config))
    with pytest.raises(UnknownStrategyError):
        open_to.invoke("Say thanks", {"configurable": {"strategy": "soup"}})


def test_traces_know_the_model_and_its_options(llm: LoraRetrieverLLM, base: Path) -> None:
    seen: dict[str, Any] = {}

    class Trace(BaseCallbackHandler):
        def on_llm_start(self, serialized: Any, prompts: Any, *, metadata: Any = None, **_: Any) -> None:
            seen.update(metadata)

    llm.invoke("Add 3 and 4", {"callbacks": [Trace()]}, stop=["x"], max_new_tokens=2)
    assert seen["ls_provider"] == "lora_hub"
    assert seen["ls_model_name"] == str(base)
    assert seen["ls_model_type"] == "llm"
    assert seen["ls_max_tokens"] == 2
    assert seen["ls_stop"] == ["x"]
    assert seen["lc_versions"].keys() >= {"langchain-core", "lora-hub-sdk"}


# -- many at once -----------------------------------------------------------------------------------------------------


class LockedHub(LoraHub):
    """Its registry's digest, which goes into every cache's key, waits for a gate, as SQL may."""

    gate: Gate | None = None

    @property
    def digest(self) -> str:
        if self.gate is not None:
            self.gate(threading.current_thread())
        return super().digest


@pytest.fixture
def crowded(base: Path, tmp_path: Path) -> Iterator[tuple[LockedHub, Gate]]:
    """A hub whose engine waits for 64 rows, and whose encoder waits for a gate."""
    gate = Gate()
    doors: list[Callable[[object], None]] = []
    engines = EngineSettings(EngineLimits(max_rows=64, gather_s=60.0, prefill_tokens=1 << 16))
    encoder = Hashing("one", lambda texts: [door(texts) for door in doors])
    with closing(LockedHub(tmp_path / "crowd.db", encoder=encoder, engines=engines)) as hub:
        for seed, (name, samples) in enumerate(TASKS.items()):
            hub.register(tiny_adapter(tmp_path / name, base, seed=seed), samples=samples)
        doors.append(gate)
        yield hub, gate
        gate.open()


@pytest.fixture
def endless(hub: LoraHub, tmp_path: Path) -> LoraRetrieverLLM:
    """A model whose answers would take minutes."""
    wide = endless_base(tmp_path / "wide")
    hub.register(tiny_adapter(tmp_path / "french", wide), samples=TASKS["french"])
    return LoraRetrieverLLM(hub=hub, base_model=str(wide), max_new_tokens=30_000)


def test_64_tasks_are_one_batch_and_the_loop_turns_all_the_while(crowded: tuple[LockedHub, Gate], base: Path) -> None:
    hub, gate = crowded
    hub.gate = digest = Gate()
    llm = LoraRetrieverLLM(hub=hub, base_model=str(base), max_new_tokens=6)
    prompts = [f"prompt {number:02}" for number in range(64)]

    class Started(BaseCallbackHandler):
        run_inline = True
        count = 0

        def on_llm_start(self, *_: Any, **__: Any) -> None:
            self.count += 1

    started = Started()

    async def ask() -> list[str]:
        answers = asyncio.gather(*(llm.ainvoke(prompt, {"callbacks": [started]}) for prompt in prompts))
        # Each gate is opened by the loop. Were it held up by a call that waits there, it would never come to that.
        for door, least in ((digest, 0), (gate, 64)):
            while not door.reached.is_set() or started.count < least:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0)
            door.open()
        return await answers

    found = asyncio.run(ask())
    assert threading.main_thread() not in digest.calls
    assert len(gate.calls) <= 3, "the first few prompts are routed, then all the others at once"
    assert hub.engine(base).batches == 1
    assert llm.batch([*prompts]) == found
    assert hub.engine(base).batches == 2


def test_cancelling_one_task_frees_its_row_and_no_other(endless: LoraRetrieverLLM, hub: LoraHub) -> None:
    engine = hub.engine(str(endless.base_model))
    whole = endless.invoke("Say hello", max_new_tokens=200)

    async def cancel() -> None:
        task = asyncio.create_task(endless.ainvoke("Say thanks"))
        while engine.stats().running < 1:
            await asyncio.sleep(0.002)
        pieces: Any = endless.astream("Say hello", max_new_tokens=200)
        answer = await anext(pieces)
        while engine.stats().running < 2:  # its first text comes a moment before it counts
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert answer + "".join([piece async for piece in pieces]) == whole

    asyncio.run(cancel())
    assert engine.stats().requests["cancelled"] == 1


def test_leaving_an_asynchronous_stream_frees_its_row(endless: LoraRetrieverLLM, hub: LoraHub) -> None:
    engine = hub.engine(str(endless.base_model))

    async def leave() -> None:
        pieces: Any = endless.astream("Say thanks")
        assert await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave())
    until = time.monotonic() + 60
    while engine.stats().requests["cancelled"] == 0:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_call_ends_at_its_deadline(endless: LoraRetrieverLLM) -> None:
    with pytest.raises(DeadlineExceededError):
        endless.invoke("Say thanks", timeout_s=0.5)
    with pytest.raises(DeadlineExceededError):
        asyncio.run(endless.model_copy(update={"timeout_s": 0.5}).ainvoke("Say thanks"))
    with pytest.raises(ConfigurationError, match="timeout_s=-1"):
        endless.invoke("Say thanks", timeout_s=-1)


def test_a_deadline_is_no_part_of_the_caches_key(pool: LoraHub, base: Path) -> None:
    llm = LoraRetrieverLLM(hub=pool, base_model=str(base), max_new_tokens=4, cache=InMemoryCache())
    answer = llm.invoke("Add 3 and 4")
    assert asyncio.run(llm.ainvoke("Add 3 and 4", timeout_s=60)) == answer
    assert pool.engine(base).batches == 1


def test_threads_and_tasks_get_the_answers_of_one_batch(llm: LoraRetrieverLLM) -> None:
    expected = llm.batch(PROMPTS)
    found: list[list[str]] = []

    async def gathered() -> list[str]:
        return await asyncio.gather(*(llm.ainvoke(prompt) for prompt in PROMPTS))

    async def streamed() -> list[str]:
        async def whole(prompt: str) -> str:
            return "".join([piece async for piece in llm.astream(prompt)])

        return await asyncio.gather(*(whole(prompt) for prompt in PROMPTS))

    def each() -> None:
        found.append([llm.invoke(prompt) for prompt in PROMPTS])

    threads = [threading.Thread(target=each) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert asyncio.run(gathered()) == asyncio.run(streamed()) == expected
    for thread in threads:
        thread.join()
    assert found == [expected] * 3


def test_calls_within_a_run_keep_to_its_namespace(llm: LoraRetrieverLLM, base: Path, tmp_path: Path) -> None:
    llm.hub.register(tiny_adapter(tmp_path / "hers", base, seed=30), samples=TASKS["french"], namespace="ann")
    chat = ChatLoraRetriever(hub=llm.hub, base_model=str(base), max_new_tokens=4)
    inside: dict[str, Callable[[str], object]] = {
        "invoke": lambda text: llm.invoke(text),
        "another configuration": lambda text: llm.invoke(text, {"configurable": {"thread": 1}}),
        "generate": lambda text: llm.generate([text]),
        "batch": lambda text: llm.batch([text, text]),
        "stream": lambda text: list(llm.stream(text)),
        "explain": lambda text: llm.explain(text),
        "chat": lambda text: chat.invoke(text),
        "chat in a batch": lambda text: chat.batch([text, text]),
        "chat as a stream": lambda text: list(chat.stream(text)),
    }
    for name, call in inside.items():
        chain: Any = RunnableLambda(call)
        # Nobody's namespace: with its own adapters alone, there is nothing to answer with.
        with pytest.raises(NoAdaptersError):
            chain.invoke("thanks", {"configurable": {"namespace": "nobody"}})
        assert chain.invoke("thanks", {"configurable": {"namespace": "ann"}}), name
    assert {member.adapter.namespace for member in llm.explain("thanks").members} == {"default"}

    def names(text: str) -> list[list[str]]:
        """What answers where the call itself names another namespace than the run around it."""
        config: Any = {"configurable": {"namespace": "default"}}
        answers = [
            chat.invoke(text, namespace="default"),
            chat.invoke(text, config),
            *chat.batch([text, text], config),
            list(chat.stream(text, config))[-1],
        ]
        return [[one["name"] for one in answer.response_metadata["route"]["adapters"]] for answer in answers]

    ours = [member.adapter.name for member in chat.explain("thanks").members]
    assert RunnableLambda(names).invoke("thanks", {"configurable": {"namespace": "ann"}}) == [ours] * 5

    def explained(text: str) -> object:
        return llm.explain(text)

    route = RunnableLambda(explained).invoke("thanks", {"configurable": {"namespace": "ann"}})
    assert isinstance(route, Route)
    assert [member.adapter.name for member in route.members] == ["hers"]
