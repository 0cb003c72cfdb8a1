"""The engine on a tiny random model: batching, permutation, seeds, stops, streaming, errors."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_hub_sdk.composition.factors import AdapterFactors
from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.demo import ADAPTERS_FOLDER
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.batch_lora import RowLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.prompt import PromptEncoder
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.running import Model, Prefill
from lora_hub_sdk.engine.scheduler import EngineLimits
from lora_hub_sdk.errors import (
    AdapterChangedError,
    ConfigurationError,
    EngineClosedError,
    ModelDamagedError,
    PromptTooLongError,
    RegistryError,
)
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from lora_hub_sdk.types import Adapter, Completion, Sampling
from tests.support import adapter_at, route_of

PROMPTS = ["a", "some longer prompt", "the third one, which is longer than the others", "b c", "últíma ñ", "zzz"]


@pytest.fixture(scope="module")
def loaded(base: Path) -> BaseModel:
    return load_base_model(resolve_model(base))


@pytest.fixture
def engine(loaded: BaseModel) -> Iterator[Engine]:
    made = Engine(loaded)
    yield made
    made.close()


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        adapter_at(tiny_adapter(folder / f"lora-{rank}", base, rank=rank, seed=rank), base, id=rank)
        for rank in (1, 3, 6)
    ]


def requests(adapters: list[Adapter], sampling: Sampling) -> list[Request]:
    """Every prompt with another route."""
    routes = [
        route_of("selection", (adapters[0], 1.0)),
        route_of("mixture", (adapters[0], 0.5), (adapters[2], 0.5)),
        route_of("base"),
        route_of("fusion", (adapters[1], 0.5), (adapters[2], 0.5)),
        route_of("selection", (adapters[1], 1.0)),
        route_of("mixture", *((adapter, 1 / 3) for adapter in adapters)),
    ]
    return [Request(prompt, route, sampling) for prompt, route in zip(PROMPTS, routes, strict=True)]


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=0.8, top_p=0.9, seed=7)])
def test_permuting_the_prompts_permutes_the_answers(
    engine: Engine, adapters: list[Adapter], sampling: Sampling
) -> None:
    asked = requests(adapters, sampling)
    straight = engine.generate(asked)
    order = [4, 2, 5, 0, 3, 1]
    turned = engine.generate([asked[place] for place in order])
    assert [turned[order.index(place)].text for place in range(6)] == [completion.text for completion in straight]
    assert [turned[order.index(place)].usage for place in range(6)] == [completion.usage for completion in straight]
    assert len({completion.text for completion in straight}) > 3


def test_rows_of_any_length_leave_the_batch_without_disturbing_the_others(
    engine: Engine, adapters: list[Adapter]
) -> None:
    asked = requests(adapters, Sampling(20))
    whole = engine.generate(asked)
    cut = [replace(request, sampling=Sampling(1 + 3 * place)) for place, request in enumerate(asked)]
    for long, short in zip(whole, engine.generate(cut), strict=True):
        # The tiny model writes bytes at random, so a cut may fall into a character.
        assert long.text.startswith(short.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert short.usage.completion_tokens <= long.usage.completion_tokens


def test_the_prompts_of_a_call_are_read_together_up_to_the_limit(loaded: BaseModel, adapters: list[Adapter]) -> None:
    whole, parts = Engine(loaded), Engine(loaded, limits=EngineLimits(max_rows=4))
    asked = requests(adapters, Sampling(4))
    together = whole.generate(asked)
    assert whole.batches == 1
    assert {completion.trace.batch_size for completion in together} == {6}
    whole.close()
    few = parts.generate(asked)
    assert parts.batches > 1
    assert max(completion.trace.batch_size for completion in few) == 4
    assert [completion.text for completion in few] == [completion.text for completion in together]
    parts.close()


def test_rows_that_end_with_their_first_token_leave_the_others_reading_alone(
    loaded: BaseModel, adapters: list[Adapter]
) -> None:
    engine = Engine(loaded)
    asked = requests(adapters, Sampling(6))
    expected = [engine.generate([request])[0].text for request in asked]
    before = engine.batches
    short = [replace(request, sampling=Sampling(1)) if place % 2 else request for place, request in enumerate(asked)]
    found = engine.generate(short)
    assert engine.batches == before + 1
    assert engine.stats().splits == 0
    for place, completion in enumerate(found):
        if place % 2:
            assert completion.usage.completion_tokens == 1
        else:
            assert completion.text == expected[place]
    engine.close()


def test_usage_and_finish_reason(engine: Engine) -> None:
    (completion,) = engine.generate([Request("hello", route_of("base"), Sampling(5))])
    assert completion.usage.prompt_tokens == 5  # the tiny tokenizer has a token for each byte
    assert completion.usage.total_tokens == 5 + completion.usage.completion_tokens
    assert completion.finish_reason == ("stop" if completion.usage.completion_tokens < 5 else "length")


def test_end_of_text_stops_a_row_and_is_counted(loaded: BaseModel) -> None:
    prompt = loaded.tokenizer("hello", return_tensors="pt")
    model: Any = loaded.model
    tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    ended = Engine(replace(loaded, eos_ids=frozenset({tokens[2]})))
    (completion,) = ended.generate([Request("hello", route_of("base"), Sampling(6))])
    assert completion.finish_reason == "stop"
    assert completion.usage.completion_tokens == tokens.index(tokens[2]) + 1
    assert completion.text == loaded.tokenizer.decode(tokens[: tokens.index(tokens[2])])


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    (free,) = engine.generate([Request("hello", route_of("base"), Sampling(20))])
    mark = free.text[4:6]
    (stopped, other) = engine.generate(
        [
            Request("hello", route_of("base"), Sampling(20, stop=(mark,))),
            Request("hello", route_of("base"), Sampling(20)),
        ]
    )
    assert stopped.text == free.text[: free.text.index(mark)]
    assert stopped.finish_reason == "stop"
    assert other.text == free.text


def test_stream_gives_the_same_text_in_pieces(engine: Engine, adapters: list[Adapter]) -> None:
    request = Request("tell me", route_of("selection", (adapters[0], 1.0)), Sampling(12))
    *pieces, last = engine.stream(request)
    assert isinstance(last, Completion)
    assert "".join(map(str, pieces)) == last.text == engine.generate([request])[0].text
    assert len(pieces) > 1


def test_leaving_a_stream_early_frees_the_engine(engine: Engine) -> None:
    stream = engine.stream(Request("tell me", route_of("base"), Sampling(200)))
    next(stream)
    stream.close()
    assert len(engine.generate([Request("next", route_of("base"), Sampling(2))])) == 1


def test_errors_of_a_stream_reach_its_reader(engine: Engine) -> None:
    stream = engine.stream(Request("x", route_of("base"), Sampling(0)))
    with pytest.raises(ConfigurationError, match="max_new_tokens"):
        next(stream)


def test_threads_take_turns_and_get_their_own_answers(engine: Engine, adapters: list[Adapter]) -> None:
    asked = requests(adapters, Sampling(8))
    expected = [engine.generate([request])[0].text for request in asked]
    found: dict[int, list[str]] = {}

    def work(worker: int) -> None:
        place = worker % len(asked)
        found[worker] = [engine.generate([asked[place]])[0].text for _ in range(3)]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {worker: [expected[worker % len(asked)]] * 3 for worker in range(12)}


def test_two_engines_on_one_model_keep_out_of_each_others_passes(loaded: BaseModel, adapters: list[Adapter]) -> None:
    asked = requests(adapters, Sampling(max_new_tokens=8))
    with closing(Engine(loaded)) as one, closing(Engine(loaded)) as other:
        alone = [engine.generate([request])[0].text for engine, request in zip([one, other] * 3, asked, strict=True)]
        for _ in range(5):
            # Each engine has every request, in another order, so that their passes are of different adapters.
            both = [one.submit_many(asked), other.submit_many(asked[::-1])]
            found = [[ticket.result().text for ticket in tickets] for tickets in both]
            assert found == [alone, alone[::-1]]


def test_tasks_of_an_event_loop_get_their_own_answers(engine: Engine, adapters: list[Adapter]) -> None:
    asked = requests(adapters, Sampling(8))
    expected = [engine.generate([request])[0].text for request in asked]

    async def one(request: Request) -> tuple[str, str]:
        (completion,) = await engine.agenerate([request])
        pieces = [piece async for piece in engine.astream(request)]
        return completion.text, "".join(piece for piece in pieces if isinstance(piece, str))

    async def every() -> list[tuple[str, str]]:
        return await asyncio.gather(*map(one, asked))

    assert asyncio.run(every()) == [(text, text) for text in expected]


def test_a_seed_gives_the_same_answer_in_any_company(engine: Engine, adapters: list[Adapter]) -> None:
    asked = requests(adapters, Sampling(12, temperature=1.2, seed=3))
    together = [completion.text for completion in engine.generate(asked)]
    assert together == [engine.generate([request])[0].text for request in asked]
    other = [replace(request, sampling=Sampling(12, temperature=1.2, seed=4)) for request in asked]
    assert [completion.text for completion in engine.generate(other)] != together


def test_an_exception_in_the_middle_leaves_no_adapter_behind(engine: Engine, adapters: list[Adapter]) -> None:
    plain = Request("hello", route_of("base"), Sampling(8))
    before = engine.generate([plain])[0].text

    def fail(_row: int, _text: str) -> None:
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        engine.generate([Request("hello", route_of("selection", (adapters[0], 9.0)), Sampling(8))], on_text=fail)
    assert engine.generate([plain])[0].text == before


def test_a_prompt_over_the_context_is_cut_or_refused(tmp_path: Path) -> None:
    engine = Engine(load_base_model(resolve_model(tiny_base(tmp_path / "short", context=32))))
    long = "x" * 100 + " the end"
    (cut,) = engine.generate([Request(long, route_of("base"), Sampling(8))])
    (tail,) = engine.generate([Request(long[-24:], route_of("base"), Sampling(8))])
    assert cut.text == tail.text
    assert cut.trace.truncated_tokens == len(long) - 24
    with pytest.raises(PromptTooLongError, match="prompt 1 of the batch has 108 tokens"):
        engine.generate(
            [
                Request("ok", route_of("base"), Sampling(8)),
                Request(long, route_of("base"), Sampling(8), overflow="refuse"),
            ]
        )
    with pytest.raises(ConfigurationError, match="leaves no room"):
        engine.generate([Request("ok", route_of("base"), Sampling(32))])


def test_no_requests_give_no_completions(engine: Engine) -> None:
    assert engine.generate([]) == []
    assert engine.batches == 0


def test_a_closed_engine_says_so(loaded: BaseModel) -> None:
    engine = Engine(loaded)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.generate([Request("x", route_of("base"))])


def test_files_that_changed_after_registration_are_refused(engine: Engine, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "mine", base, seed=1)
    adapter = adapter_at(folder, base)
    tiny_adapter(folder, base, seed=2)
    with pytest.raises(AdapterChangedError, match="register it again"):
        engine.generate([Request("x", route_of("selection", (adapter, 1.0)))])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterChangedError, match="gone"):
        engine.generate([Request("x", route_of("selection", (adapter, 1.0)))])
    tiny_adapter(folder, base, seed=1)
    assert engine.generate([Request("x", route_of("selection", (adapter, 1.0)), Sampling(2))])


def test_an_adapter_of_a_larger_base_is_never_silently_dropped(engine: Engine, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "deeper", layers=3)
    adapter = adapter_at(tiny_adapter(tmp_path / "deep", other), other)
    with pytest.raises(RegistryError, match="lacks"):
        engine.generate([Request("x", route_of("selection", (adapter, 1.0)))])


@pytest.mark.parametrize("host_bytes", [0, 1 << 30])
@pytest.mark.parametrize("device_bytes", [0, 1 << 30])
def test_budgets_of_memory_change_nothing_but_what_is_kept(
    loaded: BaseModel, adapters: list[Adapter], host_bytes: int, device_bytes: int
) -> None:
    loads: list[str] = []

    def load(adapter: Adapter) -> AdapterFactors:
        loads.append(adapter.name)
        return load_factors(adapter)

    engine = Engine(loaded, host_bytes=host_bytes, device_bytes=device_bytes, load=load)
    asked = requests(adapters, Sampling(6))
    texts = [completion.text for completion in engine.generate(asked)]
    for request, text in zip(asked, texts, strict=True):
        assert engine.generate([request])[0].text == text
    if host_bytes:
        assert sorted(loads) == ["lora-1", "lora-3", "lora-6"]
    else:
        assert len(loads) > 3
    (again,) = engine.generate([asked[0]])
    kept_on_device = engine.generate([asked[1], asked[0]])[1].trace.tiers == ("device",)
    assert again.text == texts[0]
    assert kept_on_device or not device_bytes
    engine.close()


@pytest.mark.parametrize("settings", [{"dtype": "float8"}, {"quantization": "2bit"}])
def test_unknown_settings_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="unknown"):
        ModelSettings(**settings)  # type: ignore[arg-type]


def test_a_base_without_a_tokenizer_is_damaged(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelDamagedError, match="tokenizer"):
        load_base_model(resolve_model(folder))


@pytest.mark.parametrize("device", ["cuda", "abacus"])
def test_a_device_that_is_not_there_is_refused(base: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigurationError, match=device):
        load_base_model(resolve_model(base), ModelSettings(device=device))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "similarity"), [(None, 0.9999), ("8bit", 0.99), ("4bit", 0.9)])
def test_quantized_bases_take_adapters(kind: Any, similarity: float) -> None:
    """Cosine of the logits after one prompt to the float32 base with the same, trained adapter."""
    resolved = resolve_model("smollm2-135m-instruct")
    adapter = adapter_at(ADAPTERS_FOLDER / "sentiment", resolved.folder)

    def logits(settings: ModelSettings) -> torch.Tensor:
        base, factors = load_base_model(resolved, settings), load_factors(adapter)
        prompt = PromptEncoder(base.tokenizer).encode("Is this positive or negative? I loved it.", limit=99)
        pool = RankPool.of(base, 1 << 28)
        terms = terms_of(route_of("selection", (adapter, 1.0)), {adapter.digest: factors.rank})
        with torch.inference_mode():
            found = Prefill(Model(base, pool), [prompt.ids], [RowLora(terms, pool.pin(factors))]).advance(1 << 20)
        assert found is not None
        return found[0]

    exact = logits(ModelSettings(dtype="float32"))
    found = logits(ModelSettings(dtype="float32", quantization=kind))
    assert float(torch.cosine_similarity(found, exact, dim=0)) > similarity


def test_the_base_weights_are_never_changed(loaded: BaseModel, adapters: list[Adapter]) -> None:
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    engine = Engine(loaded)
    engine.generate(requests(adapters, Sampling(4)))
    engine.close()
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(value.view(torch.uint8).equal(before[name].view(torch.uint8)) for name, value in after.items())


def test_a_program_that_never_closes_its_engine_ends_well(base: Path) -> None:
    """A daemon thread that Python stops inside torch would abort the process."""
    program = f"""
from pathlib import Path
from lora_hub_sdk.engine.base_model import load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.types import Route, Sampling

engine = Engine(load_base_model(resolve_model(Path({str(base)!r}))))
engine.generate([Request("x", Route("base", "outputs", ()), Sampling(2))])
engine.submit(Request("x", Route("base", "outputs", ()), Sampling(200)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
