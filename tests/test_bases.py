"""Several base models in one hub: each prompt finds its own, and they share a bounded memory."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from langchain_core.caches import InMemoryCache
from langchain_lora_hub import LoraRetrieverLLM
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lora_hub_sdk import EngineSettings, errors
from lora_hub_sdk.cli import app
from lora_hub_sdk.engine.base_model import ModelSettings
from lora_hub_sdk.engine.base_size import estimated_bytes
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.messages import Piece
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from lora_hub_sdk.types import Completion, Route, Routing, Sampling
from tests.encoders import Hashing
from tests.support import endless_base

SHORT = Sampling(4)
ENDLESS = Sampling(30_000)
#: The adapters of each base model, and the text that is nearest to each: its only sample.
ADAPTERS = {"red": ("roses", "cherries"), "green": ("leaves", "limes"), "blue": ("sea", "sky")}
TEXTS = [name for names in ADAPTERS.values() for name in names]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    layers = {"red": 2, "green": 1, "blue": 2}
    return {name: tiny_base(folder / name, seed=seed, layers=layers[name]) for seed, name in enumerate(ADAPTERS)}


@pytest.fixture
def fill(bases: dict[str, Path], tmp_path: Path) -> Callable[[LoraHub], LoraHub]:
    def fill(hub: LoraHub) -> LoraHub:
        for base, names in ADAPTERS.items():
            for seed, name in enumerate(names):
                hub.register(tiny_adapter(tmp_path / name, bases[base], seed=seed), samples=[name], tags=[base])
        return hub

    return fill


@pytest.fixture
def pool(open_hub: Callable[..., LoraHub], fill: Callable[[LoraHub], LoraHub]) -> LoraHub:
    return fill(open_hub(encoder=Hashing("one"), index="exact"))


@pytest.fixture
def narrow(open_hub: Callable[..., LoraHub], fill: Callable[[LoraHub], LoraHub], bases: dict[str, Path]) -> LoraHub:
    """With room for one base model at a time."""
    room = max(estimated_bytes(base, ModelSettings()) for base in bases.values()) + 1024
    return fill(open_hub(encoder=Hashing("one"), index="exact", engines=EngineSettings(base_bytes=room)))


def own_base(bases: dict[str, Path], text: str) -> Path:
    return next(bases[base] for base, names in ADAPTERS.items() if text in names)


def members(route: Route) -> list[str]:
    return [member.adapter.name for member in route.members]


def named(completion: Completion) -> list[str]:
    return members(completion.trace.route)


# -- which base ------------------------------------------------------------------------------------------------------


def test_each_prompt_is_answered_by_the_base_of_its_nearest_adapter(pool: LoraHub, bases: dict[str, Path]) -> None:
    routes = pool.route(TEXTS)
    for text, route in zip(TEXTS, routes, strict=True):
        base = own_base(bases, text)
        assert route.base_model == str(base)
        assert route.members[0].adapter.name == text
        # As many as that base has, and no other's.
        assert {member.adapter.base_model for member in route.members} == {str(base)}
        assert len(route.members) == 2
        assert members(route) == members(pool.route([text], base_model=base)[0])
    completions = pool.generate(TEXTS, sampling=SHORT)
    for text, completion in zip(TEXTS, completions, strict=True):
        (alone,) = pool.generate([text], base_model=own_base(bases, text), sampling=SHORT)
        assert (completion.text, named(completion)) == (alone.text, named(alone))
        assert completion.trace.base_model == alone.trace.base_model == str(own_base(bases, text))
    assert len({completion.text for completion in completions}) > 3, "or the bases answer alike, and nothing is shown"


def test_the_real_encoder_finds_the_base_by_meaning(hub: LoraHub, bases: dict[str, Path], tmp_path: Path) -> None:
    hub.register(tiny_adapter(tmp_path / "sums", bases["red"]), samples=["What is 12 + 30?", "Add 4 and 9."])
    hub.register(tiny_adapter(tmp_path / "french", bases["green"]), samples=["Say thanks in French", "French for yes?"])
    answers = hub.generate(["How do you say cat in French?", "5 plus 6", "bonjour in French"], sampling=SHORT)
    found = [(answer.trace.base_model, named(answer)) for answer in answers]
    assert found == [
        (str(bases[base]), [name]) for base, name in (("green", "french"), ("red", "sums"), ("green", "french"))
    ]


def test_tasks_and_streams_find_it_as_well(pool: LoraHub, bases: dict[str, Path]) -> None:
    expected = pool.generate(TEXTS, sampling=SHORT)

    async def ask() -> list[Completion]:
        answers = await pool.agenerate(TEXTS, sampling=SHORT)
        async for piece in pool.astream(TEXTS[0], sampling=SHORT):
            last = piece
        assert isinstance(last, Completion)
        assert (last.text, last.trace.base_model) == (answers[0].text, str(bases["red"]))
        # A synchronous call within a running loop, as in a notebook.
        assert pool.generate(TEXTS, sampling=SHORT)[1].text == answers[1].text
        return answers

    assert [answer.text for answer in asyncio.run(ask())] == [answer.text for answer in expected]
    *texts, last = pool.stream("limes", sampling=SHORT)
    assert isinstance(last, Completion)
    assert ("".join(map(str, texts)), last.trace.base_model) == (expected[3].text, str(bases["green"]))


def test_options_for_each_prompt_stay_with_it(pool: LoraHub, bases: dict[str, Path]) -> None:
    answers = pool.generate(
        ["sea", "roses", "sky"],
        routing=[Routing("selection"), Routing(k=2), Routing("selection")],
        sampling=[Sampling(2), Sampling(3), Sampling(4)],
    )
    assert [(named(one)[0], len(named(one)), one.usage.completion_tokens) for one in answers] == [
        ("sea", 1, 2),
        ("roses", 2, 3),
        ("sky", 1, 4),
    ]


def test_a_filter_takes_bases_away(pool: LoraHub, bases: dict[str, Path]) -> None:
    (route,) = pool.route(["sea"], routing=Routing(tags=("red",)))
    assert route.base_model == str(bases["red"])
    (route,) = pool.route(["sea"], routing=Routing(exclude=("sea",)))
    assert all(member.adapter.name != "sea" for member in route.members)
    with pytest.raises(errors.NoAdaptersError, match="no adapter for any base"):
        pool.route(["sea"], routing=Routing(tags=("black",)))


def test_where_no_adapter_fits_the_base_of_the_nearest_answers_alone(pool: LoraHub, bases: dict[str, Path]) -> None:
    text = "something else"
    nearest = pool.search(text, 1)[0].adapter
    answers = pool.generate([text, "sky"], routing=Routing(min_score=0.99), sampling=SHORT)
    assert [named(answer) for answer in answers] == [[], ["sky"]]
    assert answers[0].trace.base_model == nearest.base_model
    (alone,) = pool.generate([text], base_model=nearest.base_model, routing=Routing("base"), sampling=SHORT)
    assert answers[0].text == alone.text


def test_words_bring_no_base_forward_whose_adapter_does_not_fit(pool: LoraHub, bases: dict[str, Path]) -> None:
    """By its words one of the green base comes first, but it is below the bound; the blue one is above."""
    text = "about limes and leaves"
    pool.update("leaves", samples=[text, f"{text}, and more"])  # its vector lies halfway between these two
    own, other = pool.encoder.encode([text, "sky"])
    aside = other - (other @ own) * own
    near = pool.search(text, 1)[0].score + 0.02
    pool.update("sky", embedding=near * own + (1 - near**2) ** 0.5 * aside / np.linalg.norm(aside))
    floor = near - 0.01
    plain, bound = (
        pool.route([text], routing=Routing("selection", rerank=True, min_score=floor))[0] for floor in (None, floor)
    )
    assert (plain.base_model, members(plain)) == (str(bases["green"]), ["leaves"])
    assert (bound.base_model, members(bound)) == (str(bases["blue"]), ["sky"])


# -- which may be chosen ---------------------------------------------------------------------------------------------


def test_bases_may_be_named_by_any_of_their_names(pool: LoraHub, bases: dict[str, Path], tmp_path: Path) -> None:
    link = tmp_path / "another-name"
    link.symlink_to(bases["red"])
    for chosen in ((str(link),), (str(link), "nobody/model"), (str(link), str(bases["green"]))):
        routes = pool.route(["sea", "roses"], routing=Routing(bases=chosen))
        assert routes[1].base_model == str(bases["red"])
        assert routes[0].base_model in {str(bases["red"]), str(bases["green"])}
    with pytest.raises(errors.NoAdaptersError, match="nobody/model"):
        pool.route(["sea"], routing=Routing(bases=("nobody/model", "nobody/else")))


def test_only_loaded_ones_are_chosen_where_that_is_asked_for(pool: LoraHub, bases: dict[str, Path]) -> None:
    loaded = Routing(bases="loaded")
    for ask in (pool.route, pool.generate, lambda *a, **k: asyncio.run(pool.agenerate(*a, **k))):
        with pytest.raises(errors.ConfigurationError, match="no base model is loaded"):
            ask(["sea"], routing=loaded)
    pool.engine(bases["red"])
    assert pool.loaded_bases() == (str(bases["red"]),)
    (answer,) = pool.generate(["sea"], routing=loaded, sampling=SHORT)
    assert answer.trace.base_model == str(bases["red"])
    pool.engine(bases["blue"])
    routes = pool.route(["sea", "limes"], routing=loaded)
    assert routes[0].base_model == str(bases["blue"])
    assert routes[1].base_model != str(bases["green"])
    other = ModelSettings("bfloat16")
    with pytest.raises(errors.ConfigurationError, match="bfloat16"):
        pool.generate(["sea"], routing=loaded, settings=other)
    assert pool.unload(bases["red"])
    assert pool.loaded_bases() == (str(bases["blue"]),)


def test_named_adapters_tell_the_base_by_themselves(pool: LoraHub, bases: dict[str, Path]) -> None:
    (answer,) = pool.generate(["anything"], routing=Routing(adapters=("sky", "sea")), sampling=SHORT)
    assert (answer.trace.base_model, named(answer)) == (str(bases["blue"]), ["sky", "sea"])
    with pytest.raises(errors.ConfigurationError, match=r"'limes' is for base .*green.*'sky' for .*blue"):
        pool.generate(["anything"], routing=Routing(adapters=("sky", "limes")))
    with pytest.raises(errors.ConfigurationError, match="leaves it out"):
        pool.route(["anything"], routing=Routing(adapters=("sky",), bases=(str(bases["red"]),)))


@pytest.mark.parametrize("given", ["load", (), (3,), 3, "red"])
def test_bases_that_make_no_sense_are_refused(pool: LoraHub, given: object) -> None:
    with pytest.raises(errors.ConfigurationError, match="expected names of base models"):
        pool.route(["sea"], routing=Routing(bases=given))  # type: ignore[arg-type]


def test_what_needs_a_base_model_says_so(pool: LoraHub, bases: dict[str, Path]) -> None:
    with pytest.raises(errors.ConfigurationError, match="give base_model"):
        pool.generate(["sea"], routing=Routing("base"))
    with pytest.raises(errors.ConfigurationError, match="both given"):
        pool.generate(["sea"], base_model=bases["red"], routing=Routing(bases="loaded"))


def test_an_empty_registry_has_no_base_to_answer_with(open_hub: Callable[..., LoraHub], bases: dict[str, Path]) -> None:
    hub = open_hub(encoder=Hashing("one"), index="exact")
    assert hub.base_models() == []
    with pytest.raises(errors.NoAdaptersError, match="holds no adapters"):
        hub.generate(["sea"])
    assert hub.generate([]) == []


def test_the_base_is_loaded_from_where_its_user_said_last(
    open_hub: Callable[..., LoraHub], bases: dict[str, Path], tmp_path: Path
) -> None:
    """The registry knows it by an id of the Hub that nobody can reach."""
    hub = open_hub(encoder=Hashing("one"), index="exact", base_folders={"meta/red": bases["red"]})
    hub.register(tiny_adapter(tmp_path / "roses", bases["red"], base_name="meta/red"), samples=["roses"])
    hub.register(tiny_adapter(tmp_path / "sea", bases["blue"]), samples=["sea"])
    assert hub.base_models() == sorted(["meta/red", str(bases["blue"])])
    (answer,) = hub.generate(["roses"], sampling=SHORT)
    assert answer.trace.base_model == "meta/red"


# -- LangChain and the command line ------------------------------------------------------------------------------------


def test_a_langchain_model_without_a_base_takes_each_prompts_own(pool: LoraHub, bases: dict[str, Path]) -> None:
    llm = LoraRetrieverLLM(hub=pool, max_new_tokens=4, cache=InMemoryCache())
    result = llm.generate(["sea", "roses"])
    infos = [generations[0].generation_info or {} for generations in result.generations]
    assert [info["base_model"] for info in infos] == [str(bases["blue"]), str(bases["red"])]
    assert (result.llm_output or {})["model_name"] == f"{bases['blue']}, {bases['red']}"
    expected = [answer.text for answer in pool.generate(["sea", "roses"], sampling=SHORT)]
    assert [generations[0].text for generations in result.generations] == expected
    assert asyncio.run(llm.ainvoke("roses")) == expected[1]
    assert "".join(llm.stream("sea")) == expected[0]
    assert llm.batch(["roses", "sea"]) == expected[::-1]
    assert llm.invoke("roses", bases=[str(bases["blue"])]) != expected[1], (
        "what was cached for all bases is no answer for one"
    )
    with pytest.raises(errors.ConfigurationError, match="both given"):
        LoraRetrieverLLM(hub=pool, base_model=bases["red"], bases="loaded")
    with pytest.raises(errors.ConfigurationError, match="give base_model"):
        LoraRetrieverLLM(hub=pool, strategy="base")


def test_the_langchain_cache_knows_which_bases_were_loaded(pool: LoraHub, bases: dict[str, Path]) -> None:
    llm = LoraRetrieverLLM(hub=pool, max_new_tokens=4, cache=InMemoryCache(), bases="loaded", strategy="selection")
    with pytest.raises(errors.ConfigurationError, match="no base model is loaded"):
        llm.invoke("sea")
    pool.engine(bases["red"])
    told = llm.generate(["sea"]).generations[0][0]
    assert (told.generation_info or {})["base_model"] == str(bases["red"])
    pool.engine(bases["blue"])
    for answer in (llm.generate(["sea"]), asyncio.run(llm.agenerate(["sea"]))):
        assert (answer.generations[0][0].generation_info or {})["base_model"] == str(bases["blue"])
    pool.unload(bases["blue"])
    requests = pool.stats()[0].requests
    assert llm.invoke("sea") == told.text
    assert pool.stats()[0].requests == requests, "it was kept for these bases"


def test_a_langchain_cache_goes_by_what_is_in_the_folders(pool: LoraHub, bases: dict[str, Path]) -> None:
    llm = LoraRetrieverLLM(hub=pool, max_new_tokens=4)
    key = llm._identifying_params
    weights = bases["green"] / "model.safetensors"
    before = weights.read_bytes()
    changed = load_file(weights)
    name = "model.norm.weight"
    save_file({**changed, name: changed[name] + 1}, weights, metadata={"format": "pt"})
    try:
        assert llm._identifying_params != key
    finally:
        weights.write_bytes(before)
    assert llm._identifying_params == key


def test_the_command_line_leaves_the_base_to_the_nearest(hub: LoraHub, bases: dict[str, Path], tmp_path: Path) -> None:
    hub.register(tiny_adapter(tmp_path / "sums", bases["red"]), samples=["What is 12 + 30?", "Add 4 and 9."])
    hub.register(tiny_adapter(tmp_path / "french", bases["green"]), samples=["Say thanks in French", "French for yes?"])
    hub.close()
    command = ["generate", "5 + 6", "French for cat?", "--base-model", "nearest", "--max-new-tokens", "2"]
    database = ["--database", str(tmp_path / "hub.db")]
    told = json.loads(CliRunner().invoke(app, [*command, *database, "--json"]).stdout)
    assert [answer["base_model"] for answer in told] == [str(bases["red"]), str(bases["green"])]
    shown = CliRunner().invoke(app, [*command, *database]).stdout.replace("\n", "")
    assert f"by {bases['red']}]" in shown
    assert f"by {bases['green']}]" in shown


# -- errors and ends -------------------------------------------------------------------------------------------------


def test_where_one_base_fails_the_others_are_given_up(
    open_hub: Callable[..., LoraHub], bases: dict[str, Path], tmp_path: Path
) -> None:
    hub = open_hub(encoder=Hashing("one"), index="exact")
    wide, broken = endless_base(tmp_path / "wide"), tiny_base(tmp_path / "broken")
    hub.register(tiny_adapter(tmp_path / "long", wide), samples=["long"])
    hub.register(tiny_adapter(tmp_path / "bad", broken), samples=["bad"])
    engine = hub.engine(wide)
    (broken / "tokenizer.json").unlink()
    for ask in (hub.generate, lambda *a, **k: asyncio.run(hub.agenerate(*a, **k))):
        with pytest.raises(errors.ModelDamagedError):
            ask(["long", "bad"], sampling=ENDLESS)
    (answer,) = hub.generate(["long"], sampling=SHORT)
    assert answer.usage.completion_tokens == 4
    deadline = time.monotonic() + 60
    while engine.stats().running:
        assert time.monotonic() < deadline, "a call that has failed goes on"
        time.sleep(0.01)


def test_the_time_of_a_call_holds_for_all_its_bases(
    open_hub: Callable[..., LoraHub], bases: dict[str, Path], tmp_path: Path
) -> None:
    hub = open_hub(encoder=Hashing("one"), index="exact")
    wide = endless_base(tmp_path / "wide")
    hub.register(tiny_adapter(tmp_path / "long", wide), samples=["long"])
    hub.register(tiny_adapter(tmp_path / "sea", bases["blue"]), samples=["sea"])
    hub.generate(["long", "sea"], sampling=SHORT)
    with pytest.raises(errors.DeadlineExceededError):
        hub.generate(["long", "sea"], sampling=[ENDLESS, SHORT], timeout_s=0.3)
    with pytest.raises(errors.DeadlineExceededError):
        asyncio.run(hub.agenerate(["sea", "long"], sampling=[SHORT, ENDLESS], timeout_s=0.3))


def test_a_closed_hub_loads_no_base_again(pool: LoraHub) -> None:
    pool.generate(["sea", "roses"], sampling=SHORT)
    pool.close()
    with pytest.raises(errors.EngineClosedError):
        pool.generate(["sea", "roses"], sampling=SHORT)
    with pytest.raises(errors.EngineClosedError):
        asyncio.run(pool.agenerate(["sea", "roses"], sampling=SHORT))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_call_for_all_bases_is_answered_with_room_for_one(narrow: LoraHub, pool: LoraHub) -> None:
    expected = [answer.text for answer in pool.generate(TEXTS, sampling=SHORT)]
    assert [answer.text for answer in narrow.generate(TEXTS, sampling=SHORT, timeout_s=60)] == expected
    answers = asyncio.run(narrow.agenerate(TEXTS, sampling=SHORT, timeout_s=60))
    assert [answer.text for answer in answers] == expected
    assert len(narrow.stats()) == 1


def test_threads_and_tasks_that_ask_for_all_bases_in_turn_are_all_answered(
    narrow: LoraHub, pool: LoraHub, bases: dict[str, Path]
) -> None:
    expected = {text: answer.text for text, answer in zip(TEXTS, pool.generate(TEXTS, sampling=SHORT), strict=True)}

    def ask(number: int) -> None:
        for turn in range(4):
            text = TEXTS[(2 * number + 2 * turn + turn % 2) % 6]
            named_base = own_base(bases, text) if number % 2 else None
            (answer,) = narrow.generate([text], base_model=named_base, sampling=SHORT, timeout_s=120)
            assert answer.text == expected[text]

    async def aask(number: int) -> None:
        for turn in range(4):
            text = TEXTS[(2 * number + 2 * turn + turn % 2) % 6]
            if turn % 2:
                (answer,) = await narrow.agenerate([text], sampling=SHORT, timeout_s=120)
            else:
                async for piece in narrow.astream(text, sampling=SHORT, timeout_s=120):
                    last = piece
                assert isinstance(last, Completion)
                answer = last
            assert answer.text == expected[text]

    async def all_tasks() -> None:
        await asyncio.gather(*(aask(number) for number in range(8)))

    with ThreadPoolExecutor(9) as callers:
        tasks = callers.submit(lambda: asyncio.run(all_tasks()))
        list(callers.map(ask, range(8)))
        tasks.result(120)


def test_a_base_that_never_fits_says_its_size_and_unloads_nothing(narrow: LoraHub, tmp_path: Path) -> None:
    narrow.generate(["sea"], sampling=SHORT)
    before = narrow.loaded_bases()
    huge = tiny_base(tmp_path / "huge", layers=8)
    with pytest.raises(errors.ConfigurationError, match=f"{estimated_bytes(huge, ModelSettings()):,} bytes"):
        narrow.generate(["sea"], base_model=huge, routing=Routing("base"))
    assert narrow.loaded_bases() == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_ends_well_while_its_base_is_unloaded(
    pool: LoraHub, bases: dict[str, Path], asynchronous: bool
) -> None:
    (expected,) = pool.generate(["sea"], sampling=Sampling(40))
    model = weakref.ref(pool.engine(bases["blue"]).base.model)

    def unload() -> None:
        assert pool.unload(bases["blue"], timeout_s=60)
        assert model() is None, "a stream that is read slowly keeps no model"
        assert pool.loaded_bases() == ()

    async def aread() -> list[Piece | Completion]:
        pieces = pool.astream("sea", sampling=Sampling(40))
        read = [await anext(pieces)]
        await asyncio.to_thread(unload)
        return [*read, *[piece async for piece in pieces]]

    if asynchronous:
        found = asyncio.run(aread())
    else:
        pieces = pool.stream("sea", sampling=Sampling(40))
        first = next(pieces)
        unload()
        found = [first, *pieces]
    assert found[-1] == expected
    assert "".join(map(str, found[:-1])) == expected.text


def test_what_was_unloaded_comes_back_when_it_is_asked_for(pool: LoraHub, bases: dict[str, Path]) -> None:
    (before,) = pool.generate(["sea"], sampling=SHORT)
    assert [stats.base_model for stats in pool.stats()] == [str(bases["blue"])]
    assert pool.unload(bases["blue"])
    assert pool.stats() == []
    assert not pool.unload(bases["blue"])
    (after,) = pool.generate(["sea"], sampling=SHORT)
    assert after.text == before.text


@pytest.mark.parametrize("base_bytes", [0, -1])
def test_no_memory_at_all_is_no_budget(base_bytes: int) -> None:
    with pytest.raises(errors.ConfigurationError, match="base_bytes"):
        EngineSettings(base_bytes=base_bytes)
