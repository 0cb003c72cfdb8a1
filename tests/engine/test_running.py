"""Prompts and running rows on real tiny models of many families: each row as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub_sdk.composition.terms import terms_of
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.engine.base_model import load_base_model
from lora_hub_sdk.engine.batch_lora import RowLora
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.rank_pool import RankPool
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.engine.running import (
    _PADDED,
    Model,
    Prefill,
    RunningRows,
    drop_places,
    places_to_read,
    prefill_groups,
)
from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Route, Sampling
from tests.support import DenseReference, adapter_at, relative_error, route_of

PROMPTS = ["a", "some longer prompt", "the third one, which is longer than the others", "b c d e"]


# -- prefill_groups ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5000), max_size=60))
def test_each_prompt_is_in_one_group_and_no_group_is_mostly_padding(lengths: list[int]) -> None:
    groups = prefill_groups(lengths)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        area = len(group) * max(lengths[place] for place in group)
        assert area - sum(lengths[place] for place in group) <= max(_PADDED, area // 4)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], []),
        ([7], [[0]]),
        ([64] * 5, [[0, 1, 2, 3, 4]]),
        ([10, 200, 30], [[1, 2], [0]]),  # 170 places of padding are few, 360 are not
        ([4000, 10, 3000], [[0, 2], [1]]),  # a quarter may be padding
    ],
)
def test_prompts_of_similar_length_are_read_side_by_side(lengths: list[int], groups: list[list[int]]) -> None:
    assert prefill_groups(lengths) == groups


@given(st.lists(st.integers(), max_size=12), st.data())
def test_dropping_takes_out_exactly_those_asked_for(rows: list[int], data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, len(rows) - 1))) if rows else set()
    left = list(enumerate(rows))
    drop_places(left, sorted(places))
    assert sorted(left) == [(place, row) for place, row in enumerate(rows) if place not in places]


# -- on a model --------------------------------------------------------------------------------------------------------


class Bench:
    """A tiny base with three adapters, and passes over it by hand."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base = load_base_model(resolve_model(base))
        self.adapters = [
            adapter_at(tiny_adapter(folder / f"lora-{rank}", base, rank=rank, seed=rank), base, id=rank)
            for rank in (1, 3, 6)
        ]
        self.factors = {adapter.digest: load_factors(adapter) for adapter in self.adapters}
        self.pool = RankPool.of(self.base, 1 << 24)
        self.model = Model(self.base, self.pool)
        self.routes = [
            route_of("selection", (self.adapters[0], 1.0)),
            route_of("mixture", (self.adapters[1], 0.5), (self.adapters[2], 0.5)),
            route_of("base"),
            route_of("fusion", (self.adapters[0], 0.5), (self.adapters[2], 0.6)),
        ]

    def row(self, route: Route) -> RowLora:
        terms = terms_of(route, {digest: factors.rank for digest, factors in self.factors.items()})
        return RowLora(terms, tuple(row for digest in terms.digests for row in self.pool.pin(self.factors[digest])))

    def prefill(self, prompts: list[str], routes: list[Route]) -> Prefill:
        ids: Any = self.base.tokenizer(prompts).input_ids
        return Prefill(self.model, ids, [self.row(route) for route in routes])


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(base, tmp_path_factory.mktemp("running"))


def join(running: RunningRows, prefill: Prefill, keep: Sequence[int]) -> None:
    """Read prompts in one go, and let some of them in."""
    assert prefill.advance(prefill.places) is not None
    running.join(prefill, keep)


@torch.inference_mode()
def greedy(bench: Bench, prefill: Prefill, places: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after the prompts read in pieces, and those of the last of ``count`` greedy steps."""
    logits = None
    while logits is None:
        before = prefill.places
        logits = prefill.advance(places)
        assert prefill.places < before
    first, running = logits, RunningRows(bench.model)
    running.join(prefill, range(len(prefill.lengths)))
    for _ in range(count):
        logits = running.step(logits.argmax(-1).tolist())
    return first, logits


@pytest.mark.parametrize("places", [1, 4, 13, 60, 10_000])
def test_a_prompt_read_in_pieces_gives_what_it_gives_whole(bench: Bench, places: int) -> None:
    """Short rows are nothing but padding in the first pieces."""
    for found, want in zip(
        greedy(bench, bench.prefill(PROMPTS, bench.routes), places, 5),
        greedy(bench, bench.prefill(PROMPTS, bench.routes), 1 << 20, 5),
        strict=True,
    ):
        assert relative_error(found, want) < 1e-5


@pytest.mark.parametrize("keep", [[0], [2], [1, 3], [0, 1, 2, 3]])
@torch.inference_mode()
def test_those_who_join_after_a_prefill_go_on_as_if_alone(bench: Bench, keep: list[int]) -> None:
    running = RunningRows(bench.model)
    join(running, bench.prefill(PROMPTS, bench.routes), keep)
    running.step([7] * len(keep))
    longer = "a late comer, somewhat longer than those before, and so before their first column"
    join(running, bench.prefill([longer], bench.routes[1:2]), [0])
    found = running.step([8] * (len(keep) + 1))
    for row, place in zip(found, keep, strict=False):
        alone = RunningRows(bench.model)
        join(alone, bench.prefill([PROMPTS[place]], [bench.routes[place]]), [0])
        alone.step([7])
        assert relative_error(row, alone.step([8])[0]) < 1e-5
    alone = RunningRows(bench.model)
    join(alone, bench.prefill([longer], bench.routes[1:2]), [0])
    assert relative_error(found[-1], alone.step([8])[0]) < 1e-5


@settings(deadline=None, max_examples=15)
@given(st.data())
@torch.inference_mode()
def test_rows_that_join_and_leave_in_any_order_stay_what_they_are_alone(bench: Bench, data: st.DataObject) -> None:
    running = RunningRows(bench.model)
    rows: list[tuple[str, Route, list[int]]] = []
    for _ in range(data.draw(st.integers(2, 7))):
        if not rows or data.draw(st.booleans(), "join"):
            prompts = data.draw(st.lists(st.text("abc ", min_size=1, max_size=70), min_size=1, max_size=3), "prompts")
            routes = [data.draw(st.sampled_from(bench.routes)) for _ in prompts]
            prefill = bench.prefill(prompts, routes)
            prefill.advance(1 << 20)
            running.join(prefill, range(len(prompts)))
            rows += [(prompt, route, []) for prompt, route in zip(prompts, routes, strict=True)]
        elif data.draw(st.booleans(), "drop"):
            places = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1)), "places"))
            running.drop(places)
            drop_places(rows, places)
        if rows:
            tokens = [data.draw(st.integers(2, 200)) for _ in rows]
            found = running.step(tokens)
            for (_, _, seen), token in zip(rows, tokens, strict=True):
                seen.append(token)
    for place, (prompt, route, seen) in enumerate(rows):
        ids: Any = bench.base.tokenizer(prompt).input_ids
        whole = Prefill(bench.model, [[*ids, *seen]], [bench.row(route)]).advance(1 << 20)
        assert whole is not None
        assert relative_error(found[place], whole[0]) < 1e-4


@torch.inference_mode()
def test_a_row_of_numbers_that_are_none_leaves_its_neighbours_alone(bench: Bench) -> None:
    """Also those that take its place."""
    running = RunningRows(bench.model)
    prefill = bench.prefill(PROMPTS[:3], bench.routes[:3])
    prefill.advance(1 << 20)
    for layer in prefill.cache.layers:
        layer.keys[1], layer.values[1] = torch.nan, torch.nan
    running.join(prefill, [0, 1, 2])
    found = running.step([7, 7, 7])
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    running.drop([1])
    late = bench.prefill(["x"], bench.routes[3:])
    late.advance(1 << 20)
    running.join(late, [0])
    found = running.step([7, 7, 7])
    alone, alone_prefill = RunningRows(bench.model), bench.prefill(["x"], bench.routes[3:])
    alone_prefill.advance(1 << 20)
    alone.join(alone_prefill, [0])
    assert relative_error(found[2], alone.step([7])[0]) < 1e-5


@torch.inference_mode()
def test_between_passes_and_after_one_that_failed_the_model_is_the_base_model(bench: Bench) -> None:
    model: Any = bench.base.model
    ids = torch.tensor([[5, 6, 7]])
    plain = model(ids).logits
    loud = route_of("selection", (bench.adapters[2], 50.0))
    bench.prefill(["abc"], [loud]).advance(1 << 20)
    assert model(ids).logits.equal(plain)
    broken = bench.prefill(["abc"], [loud])
    broken._ids = broken._ids + 100_000  # no such token
    with pytest.raises(IndexError):
        broken.advance(1 << 20)
    assert model(ids).logits.equal(plain)
    assert not any("forward" in module.__dict__ for module in model.modules())


# -- families ----------------------------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
_GEMMA = {**_SMALL, "sliding_window": 5, "head_dim": 8, "query_pre_attn_scalar": 8}
_OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.25}
#: Sliding windows shorter than the prompts, flattened inputs, ALiBi, joined projections, Conv1D, routed experts.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "mistral": ("MistralConfig", {**_SMALL, "sliding_window": 5}, ("q_proj", "v_proj", "down_proj")),
    "gemma2": ("Gemma2Config", _GEMMA, ("q_proj", "down_proj")),
    "gemma3": ("Gemma3TextConfig", _GEMMA, ("q_proj", "down_proj")),
    "qwen2": (
        "Qwen2Config",
        {**_SMALL, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
        ("k_proj", "gate_proj"),
    ),
    "opt": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 32, "max_position_embeddings": 256}, ("q_proj", "fc1", "fc2")),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.25}, ("c_attn", "c_fc")),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, ("query_key_value", "dense_h_to_4h")),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ("q_proj", "o_proj"),
    ),
}


def family(name: str, base: Path, folder: Path) -> Path:
    """A random model of that family with the tiny base's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config, options, _ = FAMILIES[name]
    build: Any = transformers.AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    model = build(
        getattr(transformers, config)(
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **options,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_on_another_family_equals_its_rows_alone_and_transformers_generate(
    name: str, base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = family(name, base, tmp_path / name)
    modules = FAMILIES[name][2]
    one, other = (
        adapter_at(tiny_adapter(tmp_path / f"lora-{rank}", folder, rank=rank, seed=rank, modules=modules), folder)
        for rank in (2, 5)
    )
    routes = [
        route_of("selection", (one, 1.0)),
        route_of("mixture", (one, 0.5), (other, 0.5)),
        route_of("base"),
        route_of("fusion", (one, 0.5), (other, 0.6)),
    ]
    loaded = load_base_model(resolve_model(folder))
    requests = [Request(prompt, route, Sampling(12)) for prompt, route in zip(PROMPTS, routes, strict=True)]
    engine = Engine(loaded)
    together = [completion.text for completion in engine.generate(requests)]
    assert together == [engine.generate([request])[0].text for request in requests]
    assert engine.stats().splits == 0  # a pass that fails is done again row by row, and hides what is wrong
    engine.close()
    dense = DenseReference(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = loaded.tokenizer
    for place, (prompt, route) in enumerate(zip(PROMPTS, routes, strict=True)):
        if name == "gpt2" and route.members:  # its weights lie transposed, which the reference does not know
            continue
        ids: Any = tokenizer(prompt).input_ids
        assert together[place] == tokenizer.decode(dense.greedy(route, ids, 12), skip_special_tokens=True)
    assert len(set(together)) == len(together)


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (
            "Qwen3NextConfig",
            {**_SMALL, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
            "linear_attention",
        ),
        ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 2}, "recurrent state"),
    ],
)
def test_a_model_whose_state_is_not_keys_and_values_is_refused(
    bench: Bench, config: str, options: dict[str, Any], named: str
) -> None:
    import transformers

    build: Any = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(getattr(transformers, config)(vocab_size=258, **options))
    with pytest.raises(ConfigurationError, match=f"{named}; only attention is supported"):
        Model(replace(bench.base, model=model, modules={}), bench.pool)


@pytest.mark.parametrize(
    ("decoding", "reading", "places"), [(0, 5, None), (1, 1, 256), (15, 1, 256), (1, 63, 63 * 256), (16, 40, 512)]
)
def test_a_crowd_is_read_at_once_and_a_single_prompt_in_pieces(decoding: int, reading: int, places: int | None) -> None:
    assert places_to_read(256, decoding, reading) == places
