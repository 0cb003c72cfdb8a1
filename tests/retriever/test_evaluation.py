from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_hub_sdk.errors import ConfigurationError, EmptyPromptError, ModelNotFoundError, SamplesError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.accuracy import PAPER_TABLE_2
from lora_hub_sdk.retriever.evaluation import Evaluation, Question, evaluate_retriever, evaluate_vectors, mean_over
from lora_hub_sdk.retriever.lexicon import grams, profile
from lora_hub_sdk.retriever.reranker import CANDIDATES, relevance
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.testing import tiny_adapter
from tests.encoders import Hashing

Rows = NDArray[np.float32]
A, B, C = Task("a", ("one", "two"), "x"), Task("b", ("three",), "x"), Task("c", ("four",), "y")


def rows(*given: Sequence[float]) -> Rows:
    return np.array(given, dtype=np.float32)


def random_rows(count: int, seed: int, dimension: int = 8) -> Rows:
    found = np.random.default_rng(seed).standard_normal((count, dimension))
    unit: Rows = (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)
    return unit


@pytest.fixture
def small() -> Evaluation:
    """Ranks 1, 2, 3 and 1, by hand: the vectors are at 0, 90 and 180 degrees."""
    questions = [Question("p", "a"), Question("q", "a"), Question("r", "c"), Question("s", "b")]
    prompts = rows((0.8, 0.6), (0.6, 0.8), (0.6, 0.8), (0, 1))
    return evaluate_vectors([A, B, C], questions, rows((2, 0), (0, 1), (-1, 0)), prompts, trained=["a", "elsewhere"])


def test_ranks_shares_and_mrr_are_those_computed_by_hand(small: Evaluation) -> None:
    assert small.ranks.tolist() == [1, 2, 3, 1]
    assert [small.tasks[place].name for place in small.first] == ["a", "b", "b", "b"]
    found = small.accuracies.clean["all"]
    assert (found.count, {k: share.value for k, share in found.top.items()}) == (4, {1: 0.5, 3: 1.0, 5: 1.0, 8: 1.0})
    assert found.mrr.value == pytest.approx((1 + 1 / 2 + 1 / 3 + 1) / 4)
    assert found.domain is not None
    assert found.domain.value == 0.75


def test_questions_of_trained_tasks_are_seen_and_all_others_unseen(small: Evaluation) -> None:
    groups = small.accuracies.clean
    assert {name: group.count for name, group in groups.items()} == {"all": 4, "seen": 2, "unseen": 2}
    assert groups["seen"].top[1].value == 0.5
    assert groups["unseen"].mrr.value == pytest.approx(2 / 3)
    assert small.trained == ("a",)


def test_confusions_are_counted_by_task_and_by_pair(small: Evaluation) -> None:
    assert small.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert [(score.task, score.count, score.top_1, dict(score.mistaken_for)) for score in small.by_task] == [
        ("a", 2, 0.5, {"b": 1}),
        ("b", 1, 1.0, {}),
        ("c", 1, 0.0, {"b": 1}),
    ]
    assert small.confused_pairs == [("a", "b", 1), ("b", "c", 1)]


def test_tasks_that_are_often_mistaken_are_one_group_and_raise_the_ceiling() -> None:
    tasks = [Task(name, (f"{name} sample",)) for name in "abc"]
    questions = [Question(f"question {number}", task) for number, task in enumerate("aabbcc")]
    prompts = rows((1, 0), (0, 1), (1, 0), (0, 1), (-1, 0), (-1, 0))
    found = evaluate_vectors(tasks, questions, rows((1, 0), (0, 1), (-1, 0)), prompts, resamples=0)
    assert found.indistinct == [("a", "b")]
    assert found.accuracies.clean["all"].top[1].value == pytest.approx(4 / 6)
    assert found.ceiling == 1.0


def test_an_adapter_that_is_exactly_as_near_counts_as_nearer() -> None:
    twins = [Task(name, ("text",)) for name in ("first", "second", "far")]
    questions = [Question("q", "first"), Question("q", "second")]
    found = evaluate_vectors(twins, questions, rows((1, 0), (1, 0), (0, 1)), rows((0.6, 0.8), (1, 0)))
    assert found.ranks.tolist() == [3, 2]
    assert found.first.tolist() == [2, 0]


def test_ranks_equal_those_of_a_full_sort() -> None:
    tasks = [Task(f"task {number}", (f"text {number}",)) for number in range(40)]
    vectors, prompts = random_rows(40, 1), random_rows(1500, 2)
    questions = [Question(f"q{number}", f"task {number % 40}") for number in range(1500)]
    found = evaluate_vectors(tasks, questions, vectors, prompts, resamples=0)
    orders = np.argsort(-(prompts.astype(float) @ vectors.T.astype(float)), axis=1)
    for row, order in enumerate(orders):
        assert found.ranks[row] == 1 + order.tolist().index(row % 40)
        assert found.first[row] == order[0]


def test_reranking_reorders_the_nearest_and_leaves_the_others_where_they_were() -> None:
    count = CANDIDATES + 10
    words = ["red", "blue", "green", "translate", "sum", "mood"]
    tasks = [Task(f"task {n}", (f"{words[n % 6]} {words[n % 5]} {n}", f"{words[n % 4]} it")) for n in range(count)]
    vectors, prompts = random_rows(count, 3), random_rows(60, 4)
    questions = [Question(f"{words[n % 6]} {words[n % 3]} it {n}", f"task {n % count}") for n in range(60)]
    plain = evaluate_vectors(tasks, questions, vectors, prompts, resamples=0)
    found = evaluate_vectors(tasks, questions, vectors, prompts, rerank=True, resamples=0)
    profiles = [profile(task.inputs) for task in tasks]
    beyond = moved = 0
    for row, question in enumerate(questions):
        cosine = prompts[row].astype(float) @ vectors.T.astype(float)
        near = np.argsort(-cosine)[:CANDIDATES]
        order = relevance(cosine[near], grams(question.text), [profiles[place] for place in near])
        own = row % count
        if own in near:
            assert found.ranks[row] == (order >= order[near.tolist().index(own)]).sum()
        else:
            assert found.ranks[row] == plain.ranks[row] > CANDIDATES
            beyond += 1
        assert order[near.tolist().index(found.first[row])] == order.max()
        moved += int(found.ranks[row] != plain.ranks[row])
    assert beyond
    assert moved


def test_a_hub_ranks_its_adapters_as_the_evaluation_says(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    hub = open_hub(encoder=Hashing("h"), index="exact")
    samples = {name: [f"{name} it, please: {n}" for n in range(3)] for name in ("sum", "sort", "sing", "say", "see")}
    for number, (name, texts) in enumerate(samples.items()):
        folder = tiny_adapter(tmp_path / name, base, seed=number)
        hub.register(folder, name=name, samples=texts, tags=[f"domain:{name[:2]}"])
    questions = [Question(f"{name} it, please: {n}", name) for name in samples for n in range(2, 6)]
    for rerank in (False, True):
        found = hub.evaluate_retriever(questions, rerank=rerank)
        searched = hub.search_many([question.text for question in questions], 5, rerank=rerank)
        for question, hits, rank in zip(questions, searched, found.ranks, strict=True):
            assert [hit.adapter.name for hit in hits].index(question.task) + 1 == rank
        assert found.leaked.sum() == 5
        assert {task.domain for task in found.tasks} == {"su", "so", "si", "sa", "se"}
    other = hub.evaluate_retriever(questions, encoder=Hashing("other"), trained=["sum"])
    assert other.encoder == "other"
    assert other.accuracies.clean["seen"].count == 3


def test_a_question_that_stands_among_any_tasks_samples_is_leaked() -> None:
    questions = [Question(" one\n ", "a"), Question("four", "b"), Question("five", "c")]
    found = evaluate_retriever(Hashing("h"), [A, B, C], questions)
    assert found.leaked.tolist() == [True, True, False]
    assert (found.accuracies.clean["all"].count, found.accuracies.leaked_too["all"].count) == (1, 3)
    assert found.confusion.sum() == 1
    assert "with leaked" in found.table()


def test_where_every_question_is_leaked_nothing_is_claimed_of_clean_ones() -> None:
    found = evaluate_retriever(Hashing("h"), [A, B], [Question("one", "a")])
    assert (found.accuracies.clean, found.ceiling) == ({}, None)
    assert found.by_task[0].top_1 is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_an_encoder_makes_the_vectors_and_its_settings_decide_on_reranking() -> None:
    encoder = Hashing("h")
    questions = [Question("five", "a"), Question("six", "b")]
    found = evaluate_retriever(encoder, [A, B], questions, resamples=0)
    expected = encoder.encode(A.inputs).mean(0)
    assert np.allclose(found.vectors[0], expected / np.linalg.norm(expected), atol=1e-6)
    assert np.allclose(np.diag(found.similarity), 1, atol=1e-6)
    assert (found.encoder, found.fingerprint, found.reranked) == ("h", encoder.fingerprint, False)
    encoder.settings = SimpleNamespace(rerank=True)  # type: ignore[attr-defined]
    assert evaluate_retriever(encoder, [A, B], questions, resamples=0).reranked
    assert not evaluate_retriever(encoder, [A, B], questions, rerank=False, resamples=0).reranked


def test_tasks_without_domains_have_no_domain_hit_rate() -> None:
    plain, told = Task("a", ("one",)), Task("b", ("two",), "x")
    questions = [Question("q", "a"), Question("r", "b")]
    found = evaluate_vectors([plain, told], questions, rows((1, 0), (0, 1)), rows((1, 0), (0, 1)))
    share = found.accuracies.clean["all"].domain
    assert share is not None
    assert share.value == 1.0
    alone = evaluate_vectors([plain], questions[:1], rows((1, 0)), rows((0.6, 0.8)))
    assert alone.accuracies.clean["all"].domain is None
    assert alone.accuracies.clean["all"].top[1].value == alone.ceiling == 1.0


def test_a_mean_over_splits_tells_the_least_and_the_greatest(small: Evaluation) -> None:
    better = evaluate_vectors([A, B, C], [Question("p", "a")], rows((1, 0), (0, 1), (-1, 0)), rows((1, 0)))
    found = mean_over([small, better])
    share = found.accuracies.clean["all"].top[1]
    assert (share.value, share.low, share.high) == (0.75, 0.5, 1.0)
    assert found.accuracies.clean["seen"].count == 2
    assert found.splits == 2
    assert "mean of 2" in found.table("x")
    json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(ConfigurationError, match="no evaluations"):
        mean_over([])
    other = evaluate_vectors([A], [Question("p", "a")], rows((1, 0)), rows((1, 0)), ks=(2,))
    with pytest.raises(ConfigurationError, match="different ks"):
        mean_over([small, other])


def test_the_table_stands_beside_the_papers(small: Evaluation) -> None:
    lines = small.table().splitlines()
    assert lines[0].split()[:2] == ["retriever", "questions"]
    assert any(line.startswith("vectors, all") and "50.0" in line for line in lines)
    assert all(any(line.startswith(name) for line in lines) for name in PAPER_TABLE_2)
    assert any("51.7" in line and "73.1" in line and "80.5" in line and "87.2" in line for line in lines)


def test_the_dictionary_is_json_and_has_every_number(small: Evaluation) -> None:
    data = json.loads(json.dumps(small.as_dict(), allow_nan=False))
    assert data["clean"]["all"]["top"]["1"]["value"] == 0.5
    assert data["confused_pairs"] == [["a", "b", 1], ["b", "c", 1]]
    assert (data["questions"], data["leaked"], data["tasks"]) == (4, 0, 3)


@dataclass
class Opposite:
    """Gives its two texts opposite vectors."""

    name: str = "opposite"
    fingerprint: str = ""
    dimension: int = 2

    def encode(self, texts: Sequence[str]) -> Rows:
        return rows(*((1.0 if text == "one" else -1.0, 0.0) for text in texts))


@pytest.mark.parametrize(
    ("tasks", "questions", "error", "told"),
    [
        ([], [Question("q", "a")], ConfigurationError, "0 tasks"),
        ([A], [], ConfigurationError, "0 questions"),
        ([A, A], [Question("q", "a")], ConfigurationError, "named more than once: 'a'"),
        ([Task("sst2", ("x",))], [Question("q", "sst-2")], ConfigurationError, "did you mean 'sst2'"),
        ([A], [Question("q", "zzz")], ConfigurationError, "leave its questions out"),
        ([A], [Question(" ", "a")], EmptyPromptError, "prompt 0"),
        ([Task("void", ())], [Question("q", "void")], SamplesError, "without texts"),
        ([A], [Question("q", "a")], SamplesError, "without direction"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tasks: list[Task], questions: list[Question], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        evaluate_retriever(Opposite(), tasks, questions)


def test_settings_that_make_no_sense_are_refused() -> None:
    questions = [Question("q", "a")]
    with pytest.raises(ConfigurationError, match="k=0"):
        evaluate_retriever(Hashing("h"), [A], questions, ks=(0,))
    with pytest.raises(ConfigurationError, match="one text"):
        evaluate_retriever(Hashing("h"), [A], questions, trained="a")
    with pytest.raises(ConfigurationError, match="1 vectors for 2 tasks"):
        evaluate_vectors([A, B], questions, rows((1, 0)), rows((1, 0)))
    with pytest.raises(ModelNotFoundError):
        evaluate_retriever("./no/such/folder", [A], questions)
