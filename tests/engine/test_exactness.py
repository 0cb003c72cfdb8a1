"""A batch gives each row what it would get alone: against dense deltas, PEFT, and transformers' generate."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import BaseModel, ModelSettings, load_base_model
from lora_hub_sdk.engine.batch_lora import RowLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.fitting import Fitting
from lora_hub_sdk.engine.forms import Form, choose_form
from lora_hub_sdk.engine.prompt import PromptEncoder
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.running import Model, Prefill, RunningRows
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.testing.tiny import ATTENTION, MLP
from lora_hub_sdk.types import Adapter, Route, Sampling
from tests.support import DenseReference, adapter_at, relative_error, route_of

TOLERANCE = 1e-4
EVERYTHING = (*ATTENTION, *MLP)
#: Ranks 1 to 16, rsLoRA, patterns, modules and layers missing: as uneven as a pool in the wild.
POOL: tuple[dict[str, Any], ...] = (
    {"rank": 1, "alpha": 2.0, "modules": EVERYTHING},
    {"rank": 2, "alpha": 8.0, "modules": MLP},
    {"rank": 4, "alpha": 4.0, "modules": ATTENTION, "rslora": True},
    {"rank": 6, "alpha": 12.0, "modules": EVERYTHING},
    {"rank": 8, "alpha": 16.0, "modules": ("q_proj", "v_proj")},
    {"rank": 16, "alpha": 16.0, "modules": ("q_proj", "k_proj", "v_proj"), "rslora": True},
    {"rank": 5, "alpha": 3.0, "modules": EVERYTHING, "rank_pattern": {"q_proj": 2, "down_proj": 11}},
    {
        "rank": 3,
        "alpha": 6.0,
        "modules": EVERYTHING,
        "rank_pattern": {"layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"layers.1.mlp.up_proj": 1.0, "o_proj": 20.0},
        "rslora": True,
    },
    {"rank": 12, "alpha": 24.0, "modules": EVERYTHING, "layers": (1,)},
    {"rank": 4, "alpha": -4.0, "modules": ("down_proj",), "dtype": "bfloat16"},
)


class Passes:
    """Prompts read and rows stepped by hand, to see logits and not only texts."""

    def __init__(self, base: BaseModel) -> None:
        self._encoder = PromptEncoder(base.tokenizer)
        self._fitting = Fitting(base.modules, embedding=base.embedding)
        self.pool = RankPool.of(base, 1 << 28)
        self.model = Model(base, self.pool)

    def ids(self, prompt: str) -> list[int]:
        return list(self._encoder.encode(prompt, limit=200).ids)

    def prefill(self, prompts: list[str], routes: list[Route]) -> Prefill:
        return Prefill(self.model, [self.ids(prompt) for prompt in prompts], [self._row(route) for route in routes])

    @torch.inference_mode()
    def logits(self, prompts: list[str], routes: list[Route]) -> Tensor:
        """(rows, vocabulary) after the prompts."""
        found = self.prefill(prompts, routes).advance(1 << 20)
        assert found is not None
        return found

    @torch.inference_mode()
    def step(self, prompts: list[str], routes: list[Route], token: int) -> Tensor:
        """(rows, vocabulary) after one token more."""
        prefill, running = self.prefill(prompts, routes), RunningRows(self.model)
        prefill.advance(1 << 20)
        running.join(prefill, range(len(prompts)))
        return running.step([token] * len(prompts))

    def _row(self, route: Route) -> RowLora:
        factors = {member.adapter.digest: self._fitting.fit(load_factors(member.adapter)) for member in route.members}
        terms = terms_of(route, {digest: one.rank for digest, one in factors.items()})
        return RowLora(terms, tuple(row for digest in terms.digests for row in self.pool.pin(factors[digest])))


class Bench:
    """One base model with a pool of adapters, an engine over it, and the references beside it."""

    def __init__(self, base: Path, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        folders = [tiny_adapter(folder / f"lora-{place}", base, seed=place, **spec) for place, spec in enumerate(POOL)]
        self.adapters = [adapter_at(path, base, id=place) for place, path in enumerate(folders)]
        self.engine = Engine(load_base_model(resolve_model(base), ModelSettings(dtype="float32")))
        self.dense = DenseReference(base, AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
        self.passes = Passes(self.engine.base)
        self.ids, self.batch_logits = self.passes.ids, self.passes.logits


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(base, tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(resolve_model("smollm2-135m-instruct").folder, tmp_path_factory.mktemp("smol-pool"))


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[str, str, list[tuple[int, float]]]]:
    """Rows of (prompt, strategy, [(adapter, weight), ...]); k from 1 to 4, and now and then no adapter at all."""
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40))
        strategy = draw(st.sampled_from(["mixture", "fusion"]))
        chosen = draw(st.lists(st.integers(0, len(POOL) - 1), max_size=4, unique=True))
        weights = draw(st.lists(st.floats(0.0, 1.0, width=32), min_size=len(chosen), max_size=len(chosen)))
        rows.append((prompt, strategy, list(zip(chosen, weights, strict=True))))
    return rows


def check_rows(bench: Bench, rows: list[tuple[str, str, list[tuple[int, float]]]], tokens: int) -> None:
    prompts = [prompt for prompt, _, _ in rows]
    routes = [
        route_of(strategy, *((bench.adapters[at], share) for at, share in members)) for _, strategy, members in rows
    ]
    logits = bench.batch_logits(prompts, routes)
    for row, (prompt, route) in enumerate(zip(prompts, routes, strict=True)):
        assert relative_error(logits[row], bench.dense.logits(route, bench.ids(prompt))) < TOLERANCE
    sampling = Sampling(max_new_tokens=tokens)
    requests = [Request(prompt, route, sampling) for prompt, route in zip(prompts, routes, strict=True)]
    together = [completion.text for completion in bench.engine.generate(requests)]
    alone = [bench.engine.generate([request])[0].text for request in requests]
    assert together == alone
    decode = bench.engine.base.tokenizer.decode
    dense = [
        decode(bench.dense.greedy(route, bench.ids(prompt), tokens), skip_special_tokens=True)
        for prompt, route in zip(prompts, routes, strict=True)
    ]
    assert together == dense


@seed(2402)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=batches())
def test_tiny_batches_equal_dense_deltas_and_rows_alone(bench: Bench, rows: Any) -> None:
    check_rows(bench, rows, tokens=6)


@pytest.mark.parametrize("form", ["lookup", "dense", "gather"])
def test_every_form_of_a_step_equals_dense_deltas(bench: Bench, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["a", "two words", "a third prompt that is longer", "b", "c"]
    routes = [
        route_of("fusion", *((bench.adapters[at], 0.3) for at in (0, 6, 7))),
        route_of("base"),
        route_of("mixture", *((bench.adapters[at], 0.25) for at in range(1, 10, 2))),
        route_of("fusion", *((bench.adapters[at], 0.2) for at in (4, 5, 8, 9))),
        route_of("selection", (bench.adapters[5], 1.0)),
    ]
    monkeypatch.setattr(
        "lora_hub_sdk.engine.batch_lora.choose_form", lambda **at: form if at["tokens"] == 1 else choose_form(**at)
    )
    found = bench.passes.step(prompts, routes, 9)
    for row, (prompt, route) in enumerate(zip(prompts, routes, strict=True)):
        assert relative_error(found[row], bench.dense.logits(route, [*bench.ids(prompt), 9])) < TOLERANCE


@pytest.mark.parametrize("strategy", ["mixture", "fusion"])
def test_a_route_that_all_rows_share_equals_dense_deltas(bench: Bench, strategy: str) -> None:
    route = route_of(strategy, *((bench.adapters[at], 0.3) for at in (0, 6, 7)))
    prompts = ["a", "two words", "a third prompt that is longer"]
    read, stepped = bench.batch_logits(prompts, [route] * 3), bench.passes.step(prompts, [route] * 3, 9)
    for row, prompt in enumerate(prompts):
        ids = bench.ids(prompt)
        assert relative_error(read[row], bench.dense.logits(route, ids)) < TOLERANCE
        assert relative_error(stepped[row], bench.dense.logits(route, [*ids, 9])) < TOLERANCE


def random_rows(seed_: int) -> list[tuple[str, str, list[tuple[int, float]]]]:
    draw = random.Random(seed_)
    words = "the a cat river translate number French sentiment of is 42 please movie short answer"
    rows = []
    for _ in range(draw.randint(2, 5)):
        members = [(at, draw.uniform(0.05, 0.5)) for at in draw.sample(range(len(POOL)), draw.randint(1, 4))]
        prompt = " ".join(draw.choices(words.split(), k=draw.randint(1, 40)))
        rows.append((prompt, draw.choice(["mixture", "fusion"]), members))
    return rows


def test_smollm2_batch_equals_dense_deltas_and_rows_alone(smol: Bench) -> None:
    check_rows(smol, random_rows(0), tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed_", range(1, 51))
def test_smollm2_batches_equal_dense_deltas_and_rows_alone(smol: Bench, seed_: int) -> None:
    check_rows(smol, random_rows(seed_), tokens=4)


@pytest.mark.parametrize("place", [place for place, spec in enumerate(POOL) if "dtype" not in spec])
def test_selection_equals_peft_one_prompt_at_a_time(bench: Bench, base: Path, place: int) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = bench.adapters[place]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter.folder)
    for prompt in ("a", "a much longer prompt than that one"):
        expected = model(torch.tensor([bench.ids(prompt)])).logits[0, -1]
        rows = bench.batch_logits([prompt, "neighbour"], [route_of("selection", (adapter, 1.0)), route_of("base")])
        assert relative_error(rows[0], expected) < TOLERANCE


def test_uniform_mixture_equals_pefts_concatenation_for_plain_adapters(bench: Bench, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = [bench.adapters[place] for place in (0, 3, 4)]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), plain[0].folder, adapter_name="a0"
    )
    for place, adapter in enumerate(plain[1:], start=1):
        model.load_adapter(adapter.folder, f"a{place}")
    # PEFT concatenates only what every adapter has, so the comparison stays on modules that all three share.
    common = set.intersection(*(set(adapter.target_modules) for adapter in plain))
    assert common == {"q_proj", "v_proj"}
    model.add_weighted_adapter(["a0", "a1", "a2"], [1 / 3] * 3, "mix", combination_type="cat")
    model.set_adapter("mix")
    prompt = "which of them?"
    expected = model(torch.tensor([bench.ids(prompt)])).logits[0, -1]
    route = route_of("mixture", *((adapter, 1 / 3) for adapter in plain))
    found = bench.batch_logits([prompt, "another"], [route, route_of("base")])[0]
    assert relative_error(found, expected) < TOLERANCE


def test_an_unmistakable_adapter_never_shows_in_another_row(bench: Bench) -> None:
    loud: Adapter = bench.adapters[3]
    prompts = [f"prompt number {place}" for place in range(9)]
    sampling = Sampling(max_new_tokens=8)
    quiet = [Request(prompt, route_of("base"), sampling) for prompt in prompts]
    mixed = [
        Request(prompt, route_of("selection", (loud, 40.0)) if place % 3 == 0 else route_of("base"), sampling)
        for place, prompt in enumerate(prompts)
    ]
    before = [completion.text for completion in bench.engine.generate(quiet)]
    after = [completion.text for completion in bench.engine.generate(mixed)]
    for place in range(len(prompts)):
        assert (after[place] == before[place]) == (place % 3 != 0)
    assert [completion.text for completion in bench.engine.generate(quiet)] == before


def test_bfloat16_stays_within_its_tolerance(base: Path, bench: Bench) -> None:
    """bfloat16 keeps 8 bits: logits of a composed row stay within 5 % of the largest float32 logit."""
    route = route_of("mixture", *((bench.adapters[place], 1 / 3) for place in (2, 3, 6)))
    ids = bench.ids("some prompt")
    passes = Passes(load_base_model(resolve_model(base), ModelSettings(dtype="bfloat16")))
    asked = ["some prompt", "x"], [route, route_of("base")]
    assert relative_error(passes.logits(*asked)[0], bench.dense.logits(route, ids)) < 0.05
    assert relative_error(passes.step(*asked, 7)[0], bench.dense.logits(route, [*ids, 7])) < 0.05
