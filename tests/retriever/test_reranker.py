"""Reranking by words: what it makes of numbers, and through a real hub that it loses nothing and is never stale."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import event

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.lexicon import Profile, grams, likeness, profile
from lora_hub_sdk.retriever.reranker import CANDIDATES, LexicalReranker, relevance
from lora_hub_sdk.retriever.settings import RetrieverSettings
from lora_hub_sdk.testing import tiny_adapter
from lora_hub_sdk.types import Hit, Routing
from tests.registry.worker import HashEncoder

TRANSLATE = ["Translate into French: good morning", "Translate into French: the red house"]
ADD = ["What is 12 + 30?", "What is 4 + 9?"]
PROMPT = "Translate into French: my old dog"
MANY = CANDIDATES + 10


class FlatEncoder:
    """An ``Encoder`` that takes all texts for one: words alone tell adapters apart."""

    name = "flat"
    fingerprint = hashlib.sha256(b"flat").hexdigest()
    dimension = 4

    def __init__(self, rerank: bool = False) -> None:
        self.settings = RetrieverSettings(rerank=rerank)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.tile(np.array([1, 0, 0, 0], dtype=np.float32), (len(texts), 1))


@pytest.fixture(scope="module")
def weights(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter's files, which many are registered from."""
    return tiny_adapter(tmp_path_factory.mktemp("weights") / "lora", base)


@pytest.fixture
def flat(open_hub: Callable[..., LoraHub], weights: Path) -> LoraHub:
    """Three adapters that only words tell apart; by name the right one is last."""
    hub = open_hub(encoder=FlatEncoder(), index="exact")
    for name, samples in {"add": ADD, "own": ["Say something"], "translate": TRANSLATE}.items():
        hub.register(weights, name=name, samples=samples, tags=[name])
    return hub


@pytest.fixture
def many(open_hub: Callable[..., LoraHub], weights: Path) -> LoraHub:
    """Ten adapters more than are reranked, in random directions, every third without samples that were kept."""
    hub = open_hub(encoder=HashEncoder(), index="exact")
    for number in range(MANY):
        samples = [f"sort the list {number} : {word}" for word in ("pear", "fig", f"word{number % 7}")]
        hub.register(weights, name=f"a{number:02}", samples=samples, keep_samples=number % 3 != 0)
    return hub


def names(hits: Sequence[Hit]) -> list[str]:
    return [hit.adapter.name for hit in hits]


def some(*texts: str) -> Profile:
    found = profile(texts)
    assert found is not None
    return found


@contextmanager
def counted(hub: LoraHub, table: str) -> Iterator[list[str]]:
    """The statements that read a table inside of the block."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if f"FROM {table}" in statement:
            seen.append(statement)

    engine = hub._registry._engine
    event.listen(engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine, "before_cursor_execute", note)


# -- numbers --------------------------------------------------------------------------------------------------------


def test_relevance_is_what_its_definition_says() -> None:
    cosines = np.array([0.9, 0.5, 0.4, 0.2])
    profiles = [some("add one"), None, some(*TRANSLATE), some(*ADD, "What is 1 + 1?")]
    near = (cosines - cosines.mean()) / cosines.std()
    raw = likeness(grams(PROMPT), [one for one in profiles if one is not None])
    words = (raw - raw.mean()) / raw.std()
    expected = [
        near[0] + near[0] / 2 + words[0] / 2,
        2 * near[1],
        near[2] + near[2] / 3 + words[1] * 2 / 3,
        near[3] + near[3] / 4 + words[2] * 3 / 4,
    ]
    assert relevance(cosines, grams(PROMPT), profiles) == pytest.approx(expected, abs=1e-6)


def test_words_that_one_candidate_alone_is_known_by_change_nothing() -> None:
    cosines = [0.9, 0.5, 0.4]
    order = relevance(cosines, grams(PROMPT), [None, None, some(*TRANSLATE)])
    assert list(order) == sorted(order, reverse=True)


@pytest.mark.parametrize("cosines", [[0.7], [0.7, 0.7, 0.7], []])
def test_candidates_that_nothing_tells_apart_are_equal(cosines: list[float]) -> None:
    profiles = [some(*ADD)] * len(cosines)
    assert relevance(cosines, grams(PROMPT), profiles).tolist() == [0.0] * len(cosines)


def test_of_two_candidates_the_nearer_one_stays_first() -> None:
    """Of two, the standard scores are 1 and -1 whatever the distance: words never outweigh the cosine."""
    near, far = relevance([0.61, 0.6], grams(PROMPT), [some(*ADD), some(*TRANSLATE)])
    assert near >= far


# -- through a hub --------------------------------------------------------------------------------------------------


def test_words_put_equally_near_adapters_in_order_and_leave_their_scores(flat: LoraHub) -> None:
    assert names(flat.search(PROMPT)) == ["add", "own", "translate"]
    hits = flat.search(PROMPT, rerank=True)
    assert names(hits)[0] == "translate"
    assert [hit.score for hit in hits] == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    assert [hit.relevance for hit in hits] == sorted(
        (hit.relevance for hit in hits), reverse=True, key=lambda one: one or 0
    )
    assert all(hit.relevance is None for hit in flat.search(PROMPT, rerank=False))
    assert names(flat.search(PROMPT, 1, rerank=True)) == ["translate"]


def test_a_reranked_search_finds_the_same_adapters(many: LoraHub) -> None:
    for prompt in ("sort the list 7 : fig", "anything else", "?"):
        plain, reranked = many.search(prompt, MANY), many.search(prompt, MANY, rerank=True)
        assert sorted(names(plain[:CANDIDATES])) == sorted(names(reranked[:CANDIDATES]))
        assert names(plain[CANDIDATES:]) == names(reranked[CANDIDATES:])
        assert {hit.adapter.name: hit.score for hit in plain} == {hit.adapter.name: hit.score for hit in reranked}
        assert [hit.relevance is None for hit in reranked] == [False] * CANDIDATES + [True] * 10


def test_the_first_of_a_wide_search_are_those_of_a_narrow_one(many: LoraHub) -> None:
    wide = many.search("sort the list 7 : fig", MANY, rerank=True)
    for k in (1, 3, CANDIDATES - 1, CANDIDATES, CANDIDATES + 1):
        assert many.search("sort the list 7 : fig", k, rerank=True) == wide[:k]


def test_many_prompts_are_reranked_as_one_by_one(many: LoraHub) -> None:
    prompts = [f"sort the list {number} : fig word{number % 5}" for number in range(120)]
    for prompt, hits in zip(prompts, many.search_many(prompts, 3, rerank=True), strict=True):
        alone = many.search(prompt, 3, rerank=True)
        assert names(hits) == names(alone)
        assert [hit.relevance for hit in hits] == pytest.approx([hit.relevance for hit in alone], abs=1e-4)


def test_filters_come_before_words(flat: LoraHub) -> None:
    assert names(flat.search(PROMPT, exclude=["translate"], rerank=True)) == ["add", "own"]
    assert names(flat.search(PROMPT, tags=["add"], rerank=True)) == ["add"]
    assert flat.search(PROMPT, namespace="other", rerank=True) == []


def test_samples_that_were_dropped_are_replaced_by_the_cosine(many: LoraHub) -> None:
    """Words give nobody without samples a bad name: by the cosine alone the nearest of those is ahead of the others."""
    prompt = "sort the list 7 : fig"
    reranked = many.search(prompt, CANDIDATES, rerank=True)
    private = [name for name in names(many.search(prompt, CANDIDATES)) if int(name[1:]) % 3 == 0]
    assert [name for name in names(reranked) if name in private] == private
    near = np.array([hit.score for hit in reranked])
    for hit in reranked:
        if hit.adapter.name in private:
            assert hit.relevance == pytest.approx(2 * (hit.score - near.mean()) / near.std(), abs=1e-5)


def test_samples_are_read_once_and_in_one_query(many: LoraHub) -> None:
    prompts = [f"prompt {number}" for number in range(9)]
    with counted(many, "samples") as read:
        first = many.search_many(prompts, rerank=True)
        assert len(read) == 1
        assert many.search_many(prompts, rerank=True) == first
        assert len(read) == 1
    with counted(many, "samples") as read:
        many.search_many(prompts, rerank=False)
        assert read == []


def test_replaced_samples_count_at_once(flat: LoraHub, open_hub: Callable[..., LoraHub], weights: Path) -> None:
    assert names(flat.search(PROMPT, 1, rerank=True)) == ["translate"]
    flat.update("translate", samples=ADD)
    flat.update("add", samples=TRANSLATE)
    assert names(flat.search(PROMPT, 1, rerank=True)) == ["add"]
    # Another hub has profiles of its own, of samples that this one replaces.
    other = open_hub(encoder=FlatEncoder(), index="exact")
    assert names(other.search(PROMPT, 1, rerank=True)) == ["add"]
    flat.remove("add")
    flat.register(weights, name="add", samples=["Say nothing"])
    flat.register(weights, name="late", samples=TRANSLATE)
    assert names(other.search(PROMPT, 1, rerank=True)) == ["late"]
    assert other.search(PROMPT, 9, rerank=True) == flat.search(PROMPT, 9, rerank=True)


def test_samples_that_are_no_longer_kept_do_not_count(flat: LoraHub) -> None:
    assert names(flat.search(PROMPT, 1, rerank=True)) == ["translate"]
    flat.update("translate", samples=TRANSLATE, keep_samples=False)
    (hit,) = [hit for hit in flat.search(PROMPT, rerank=True) if hit.adapter.name == "translate"]
    assert hit.relevance == 0.0


@pytest.mark.parametrize("budget", [0, 4000])
def test_profiles_keep_to_their_budget(many: LoraHub, budget: int) -> None:
    prompts = [f"sort the list {number} : fig" for number in range(12)]
    found = many.search_many(prompts, 20)
    wanted = LexicalReranker(many._registry).rerank(prompts, found)
    small = LexicalReranker(many._registry, budget_bytes=budget)
    for prompt, hits, row in zip(prompts, found, wanted, strict=True):
        assert small.rerank([prompt], [hits]) == [row]
        assert small.size_bytes <= budget
    large = LexicalReranker(many._registry)
    large.rerank(prompts, found)
    assert large.size_bytes > 4000


def test_threads_search_while_samples_change(flat: LoraHub) -> None:
    """Each answer is that of the samples before or after an update, and the last ones that of the last samples."""
    done = threading.Event()

    def searches() -> set[str]:
        first: set[str] = set()
        while not done.is_set():
            first.update(names(flat.search(PROMPT, 1, rerank=True)))
        return first

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(searches) for _ in range(3)]
        try:
            for turn in range(6):
                for name, samples in zip(("add", "translate"), (TRANSLATE, ADD)[:: 1 if turn % 2 else -1], strict=True):
                    flat.update(name, samples=samples)
        finally:
            done.set()
        # Between two updates both have the same samples, and "add" is the first of them.
        assert set().union(*(one.result() for one in running)) <= {"add", "translate"}
    assert names(flat.search(PROMPT, 1, rerank=True)) == ["add"]


# -- who says so ----------------------------------------------------------------------------------------------------


def test_a_call_decides_before_the_hub_and_the_hub_before_the_encoder(
    flat: LoraHub, open_hub: Callable[..., LoraHub]
) -> None:
    for told, hubs, asked, reranked in (
        (False, None, None, False),
        (True, None, None, True),
        (True, False, None, False),
        (False, True, None, True),
        (True, True, False, False),
        (False, False, True, True),
    ):
        hub = open_hub(encoder=FlatEncoder(told), index="exact", rerank=hubs)
        first = "translate" if reranked else "add"
        assert names(hub.search(PROMPT, 1, rerank=asked)) == [first]
        (route,) = hub.route([PROMPT], base_model=hub.list()[0].base_model, routing=Routing("selection", rerank=asked))
        assert route.members[0].adapter.name == first
        hub.close()


def test_an_encoder_that_says_nothing_does_not_rerank(many: LoraHub) -> None:
    assert all(hit.relevance is None for hit in many.search("sort the list 7 : fig"))


def test_the_digest_tells_whether_searches_rerank(flat: LoraHub, open_hub: Callable[..., LoraHub]) -> None:
    digests = {
        open_hub(encoder=FlatEncoder(told), index="exact", rerank=hubs).digest
        for told, hubs in ((False, None), (False, True), (True, None), (True, False))
    }
    assert len(digests) == 2
    assert flat.digest in digests


@pytest.mark.parametrize("wrong", ["no", 1, 0.0])
def test_neither_yes_nor_no_is_refused(flat: LoraHub, open_hub: Callable[..., LoraHub], wrong: bool) -> None:
    with pytest.raises(ConfigurationError, match="rerank"):
        flat.search(PROMPT, rerank=wrong)
    with pytest.raises(ConfigurationError, match="rerank"):
        open_hub(encoder=FlatEncoder(), rerank=wrong)


def test_what_min_score_drops_gives_its_place_to_the_next(many: LoraHub) -> None:
    """With k=2 the route has the two most relevant of all that reach the bound, as many as without words."""
    prompt, base = "sort the list 7 : fig word0", many.list()[0].base_model
    floor = many.search(prompt, 6)[-1].score
    (route,) = many.route([prompt], base_model=base, routing=Routing(k=2, min_score=floor, rerank=True))
    reached = [hit for hit in many.search(prompt, 20, rerank=True) if hit.score >= floor]
    assert [member.adapter.name for member in route.members] == names(reached[:2])
    (none,) = many.route([prompt], base_model=base, routing=Routing(k=2, min_score=0.999, rerank=True))
    assert none.members == ()
