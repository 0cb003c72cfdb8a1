"""The engine benchmark on a tiny model: what it promises to measure is what it measures. No timings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks._engine_zipf import zipf_stream
from benchmarks._report import Asked
from benchmarks._rounds import in_turns
from benchmarks._systems import EinsumSystem, GenerateSystem
from benchmarks._workload import Sizes, build_workload, checkpoint, random_adapters
from benchmarks.engine import PARTS, main
from lora_hub_sdk.composition.mapping import build_plan
from lora_hub_sdk.engine.adapter_file import load_factors
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing.tiny import tiny_base

SIZES = Sizes(batch=4, prompt_tokens=12, shortest=12, new_tokens=6, adapters=12, rank=2, rounds=2, threads=1)
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SIZES).items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], base: Path) -> Callable[..., list[dict[str, Any]]]:
    def reports(part: str, *options: str) -> list[dict[str, Any]]:
        main(["--json", "--dtype=float32", f"--part={part}", "--base-model", str(base), *SMALL, *options])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return reports


# -- what is measured with


def test_a_random_adapter_is_like_the_others_and_different_from_each(base: Path, tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path, base, 4, rank=2, dtype="bfloat16")

    found = [load_factors(adapter) for adapter in adapters]  # which checks the digest
    assert len({one.digest for one in found}) == len({str(one.modules) for one in found}) == 4
    assert len({frozenset((path, one.rank) for path, one in factors.modules.items()) for factors in found}) == 1


def test_the_stream_of_requests_prefers_the_first_adapters_as_zipf_says(base: Path, tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path, base, 12, rank=1)

    stream = zipf_stream(adapters, Sizes(k=1, prompt_tokens=3), 100, 4000)

    drawn = Counter(one.route.members[0].adapter.id for one in stream)
    assert [one for one, _ in drawn.most_common(3)] == [0, 1, 2]
    assert drawn[0] / drawn[3] == pytest.approx(4, rel=0.25)
    mixed = zipf_stream(adapters, Sizes(k=3, prompt_tokens=3), 100, 50)
    assert all(len({member.adapter.id for member in one.route.members}) == 3 for one in mixed)


def test_the_einsums_memory_is_the_tensor_of_the_paper(base: Path, tmp_path: Path) -> None:
    from benchmarks._live_bytes import live_bytes

    adapters = random_adapters(tmp_path, base, SIZES.adapters, SIZES.rank)
    workload = build_workload(adapters, SIZES, 200)
    model = checkpoint(resolve_model(base), "float32").load()
    plain = GenerateSystem("plain", model, model.model, workload)
    einsum = EinsumSystem("einsum", model, workload, workload.mixture)
    own, without = (live_bytes(model, lambda of=of: of.run(1)) for of in (einsum, plain))  # type: ignore[misc]

    widest = max(d_out for d_out, _ in model.shapes.values() if d_out < 200)  # the vocabulary has no adapter
    elements = SIZES.batch * SIZES.prompt_tokens * len(build_plan(workload.mixture).adapters) * widest
    assert max(more - less for more, less in zip(own, without, strict=True)) == pytest.approx(4 * elements, rel=0.1)


def test_the_memory_of_the_same_run_is_the_same(base: Path, tmp_path: Path) -> None:
    from benchmarks._live_bytes import live_bytes

    workload = build_workload(random_adapters(tmp_path, base, 3, rank=1), SIZES, 200)
    model = checkpoint(resolve_model(base), "float32").load()
    plain = GenerateSystem("plain", model, model.model, workload)
    first, second = live_bytes(model, lambda: plain.run(3)), live_bytes(model, lambda: plain.run(3))

    assert first == second
    assert len(first) == 3 * (1 + len(model.shapes))


def test_rounds_take_turns_after_one_that_is_not_counted() -> None:
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)  # type: ignore[misc]

    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("asked", "median", "told"),
    [
        (Asked(0.8), 0.8, (">= 0.8", True)),
        (Asked(0.8), 0.79, (">= 0.8", False)),
        (Asked(3.0, most=True), 3.1, ("<= 3", False)),
        (Asked(3.0, most=True), 2.9, ("<= 3", True)),
    ],
)
def test_a_ratio_tells_whether_it_is_what_was_asked(asked: Asked, median: float, told: tuple[str, bool]) -> None:
    figures = asked.of({"median": median})
    assert (figures["asked"], figures["reached"]) == told


# -- the parts


@pytest.mark.slow
def test_steps_are_measured_without_padding_and_with(run: Callable[..., list[dict[str, Any]]]) -> None:
    equal, padded = run("steps")

    assert (equal["settings"]["shortest"], padded["settings"]["shortest"]) == (12, 6)
    assert equal["agree"]["mixture == einsum"] == {"rows_equal": 4, "rows": 4}
    assert padded["agree"] == {"base == transformers": {"rows_equal": 4, "rows": 4}}
    assert "mixture / einsum" not in padded["ratios"]


@pytest.mark.slow
def test_composing_takes_memory_of_its_own_in_both_systems(run: Callable[..., list[dict[str, Any]]]) -> None:
    (report,) = run("memory")

    own, other = report["systems"]["mixture"], report["systems"]["einsum"]
    assert 0 < own["peak_bytes"] < other["peak_bytes"]
    assert report["ratios"]["mixture / einsum, peak bytes"]["median"] == own["peak_bytes"] / other["peak_bytes"]


@pytest.mark.slow
def test_memory_for_a_few_adapters_is_kept_to_and_changes_no_answer(run: Callable[..., list[dict[str, Any]]]) -> None:
    (report,) = run("zipf", "--many=40", "--requests=60", "--budget=12")

    few, all_of_them = report["systems"]["memory for 12"], report["systems"]["all resident"]
    assert few["host_adapters"] <= 12 < all_of_them["host_adapters"] == report["settings"]["asked_for"]
    assert few["host_evictions"] > 0 == all_of_them["host_evictions"]
    assert report["agree"] == {"memory for 12 == all resident": {"rows_equal": 60, "rows": 60}}


@pytest.mark.slow
def test_single_calls_get_what_a_batch_gets_and_a_short_one_interrupts_long_ones(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    calls, arrivals = run("callers", "--calls=8", "--long-tokens=40")

    assert calls["agree"] == {"ainvoke == batch": {"rows_equal": 8, "rows": 8}}
    assert arrivals["settings"]["arrivals"] >= SIZES.rounds
    assert arrivals["ratios"]["first token / step"]["asked"] == "<= 3"


@pytest.mark.slow
def test_a_cold_adapter_comes_from_disk_and_is_there_afterwards(run: Callable[..., list[dict[str, Any]]]) -> None:
    (report,) = run("cold", "--cold=3")

    assert report["agree"] == {"found on disk, then on the device": {"rows_equal": 5, "rows": 5}}


@pytest.mark.slow
def test_each_form_is_timed_where_it_can_serve(run: Callable[..., list[dict[str, Any]]]) -> None:
    (report,) = run("forms")

    assert [name.rpartition(", ")[0] for name in report["systems"]] == [
        *(f"{form}, 1 tokens a row" for form in ("lookup", "dense", "gather")),
        "gather, 12 tokens a row",
        *(f"{form}, 1 tokens a row" for form in ("lookup", "dense", "gather")),
        "gather, 12 tokens a row",
        *(f"{form}, 1 tokens a row" for form in ("shared", "lookup", "dense", "gather")),
        "shared, 12 tokens a row",
        "gather, 12 tokens a row",
    ]


@pytest.mark.slow
def test_every_part_runs_where_none_is_named(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    few = ["--many=12", "--requests=4", "--budget=12", "--calls=4", "--long-tokens=12", "--cold=1"]
    main(["--dtype=bfloat16", "--base-model", str(base), *SMALL, *few])

    out = capsys.readouterr().out
    assert out.count("'cpu':") == len(PARTS) + 2  # steps and callers have two reports each


@pytest.mark.slow  # transformers' paged cache takes what memory there is
def test_the_loops_give_the_same_tokens(run: Callable[..., list[dict[str, Any]]]) -> None:
    (report,) = run("loops")

    for found in report["agree"].values():
        assert found == {"rows_equal": 2 * SIZES.batch, "rows": 2 * SIZES.batch}
    assert set(report["ratios"]) == {"engine / generate", "engine / generate_batch"}


# -- the same on a GPU


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no CUDA device.*--device cpu"):
        gpu.main([])


@pytest.mark.slow
def test_a_random_llama_of_any_size_gives_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--hidden=64",
        "--layers=2",
        "--prompt-tokens=8",
        "--new-tokens=4",
        "--adapters=6",
        "--rank=2",
        "--rounds=1",
    ]
    gpu.main(["--json", "--device=cpu", "--batches", "2", "3", "--threads=1", *small])

    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(report["settings"]["batch"], report["settings"]["part"]) for report in reports] == [
        (2, "steps"),
        (2, "memory"),
        (3, "steps"),
        (3, "memory"),
    ]
    assert reports[0]["ratios"]["mixture / base"]["asked"] == ">= 0.9"
    assert reports[0]["settings"]["base_model"] == "llama-64x2-random"
