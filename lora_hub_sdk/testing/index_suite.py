"""What every vector index has to do, as tests: subclass ``VectorIndexSuite`` and give it an ``index`` fixture."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lora_hub_sdk.registry.index import Entry, IndexFilter, Vector, VectorIndex

_DIMENSION: Final = 24
_HERE: Final = IndexFilter("here")

_Step = tuple[str, int, int, int, int]
_STEPS: Final = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "delete", "search"]),
        st.integers(0, 11),  # the adapter
        st.integers(1, 3),  # the vector
        st.integers(0, 2),  # the namespace or, in a search, the kind of filter
        st.integers(1, 6),  # how many to find
    ),
    min_size=4,
    max_size=25,
)


def unit_vectors(count: int, seed: int, dimension: int = _DIMENSION) -> NDArray[np.float32]:
    """(count, dimension) float32 in random directions, each of length 1."""
    drawn = np.random.default_rng(seed).standard_normal((count, dimension))
    vectors: NDArray[np.float32] = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return vectors


def entries(
    count: int, *, seed: int = 0, namespace: str = "here", base_model: str = "base", first: int = 1
) -> list[Entry]:
    """Entries of adapters ``first``, ``first + 1``, ..."""
    vectors = unit_vectors(count, seed)
    return [Entry(first + row, 1000 + first + row, namespace, base_model, vectors[row]) for row in range(count)]


def expected(held: Sequence[Entry], query: Vector, count: int, allowed: IndexFilter) -> list[tuple[str, float]]:
    """What a search must find, computed the slow way."""
    found = [
        (entry.key, float(entry.vector.astype(np.float64) @ query.astype(np.float64)))
        for entry in held
        if entry.namespace == allowed.namespace
        and allowed.base_model in (None, entry.base_model)
        and (allowed.only is None or entry.adapter_id in allowed.only)
        and entry.adapter_id not in allowed.exclude
    ]
    return sorted(found, key=lambda pair: -pair[1])[:count]


def assert_finds(index: VectorIndex, held: Sequence[Entry], query: Vector, count: int, allowed: IndexFilter) -> None:
    """The index finds what it must; where scores are equal, any order and any choice will do."""
    [found] = index.search([query], count, allowed)
    wanted = expected(held, query, count, allowed)
    np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], atol=1e-5)
    assert len({key for key, _ in found}) == len(found)
    true = dict(expected(held, query, len(held), allowed))
    for key, score in found:
        assert true[key] == pytest.approx(score, abs=1e-5)


class VectorIndexSuite:
    """Subclass it with a fixture ``index`` that gives an empty index and closes it afterwards."""

    def test_an_empty_index_finds_nothing(self, index: VectorIndex) -> None:
        assert index.search(list(unit_vectors(2, 1)), 3, _HERE) == [[], []]
        assert index.search(list(unit_vectors(1, 1)), 3, IndexFilter("here", "base")) == [[]]
        assert index.count() == 0
        assert index.keys() == set()
        assert index.read(["1-1"]) == {}

    def test_no_queries_and_no_entries_are_allowed(self, index: VectorIndex) -> None:
        index.put([])
        index.delete([])
        assert index.read([]) == {}
        assert index.search([], 3, _HERE) == []
        assert index.search(list(unit_vectors(2, 1)), 0, _HERE) == [[], []]

    def test_the_nearest_come_first_with_their_cosines(self, index: VectorIndex) -> None:
        held = entries(300)
        index.put(held)
        queries = unit_vectors(8, 7)
        for query, found in zip(queries, index.search(list(queries), 5, _HERE), strict=True):
            wanted = expected(held, query, 5, _HERE)
            assert [key for key, _ in found] == [key for key, _ in wanted]
            np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], atol=1e-5)

    def test_a_vector_finds_itself_and_its_opposite_last(self, index: VectorIndex) -> None:
        held = entries(20)
        held.append(Entry(99, 99, "here", "base", -held[3].vector))
        index.put(held)
        [found] = index.search([held[3].vector], 21, _HERE)
        assert (found[0][0], found[-1][0]) == (held[3].key, "99-99")
        np.testing.assert_allclose([found[0][1], found[-1][1]], [1.0, -1.0], atol=1e-5)

    def test_other_namespaces_are_never_found(self, index: VectorIndex) -> None:
        held = [*entries(30), *entries(30, seed=1, namespace="there", first=100)]
        index.put(held)
        for namespace in ("here", "there", "nowhere"):
            assert_finds(index, held, held[0].vector, 40, IndexFilter(namespace))

    def test_a_base_model_can_be_asked_for_or_left_open(self, index: VectorIndex) -> None:
        held = [
            *entries(15),
            *entries(15, seed=1, base_model="other", first=50),
            *entries(15, seed=2, namespace="there", base_model="other", first=100),
        ]
        index.put(held)
        for base_model in ("base", "other", "none", None):
            for count in (3, 40):
                assert_finds(index, held, held[20].vector, count, IndexFilter("here", base_model))

    def test_names_that_look_alike_are_kept_apart(self, index: VectorIndex) -> None:
        places = [("a", "bc"), ("ab", "c"), ("A", "bc"), ("a/b", "c d"), ("ä", "名"), ("", "")]
        held = [
            Entry(row, row, namespace, base_model, vector)
            for row, ((namespace, base_model), vector) in enumerate(zip(places, unit_vectors(6, 3), strict=True), 1)
        ]
        index.put(held)
        for row, (namespace, base_model) in enumerate(places, 1):
            for allowed in (IndexFilter(namespace, base_model), IndexFilter(namespace)):
                [found] = index.search([held[0].vector], 9, allowed)
                assert [key for key, _ in found] == [f"{row}-{row}"]

    def test_only_some_adapters(self, index: VectorIndex) -> None:
        held = [*entries(200), *entries(100, seed=1, base_model="other", first=500)]
        index.put(held)
        for only in ({1}, {1, 2, 3, 510}, {77, 9999}, {9999}, set(range(50, 180)), set(range(1, 1000))):
            for base_model in ("base", None):
                for query in unit_vectors(3, 11):
                    assert_finds(index, held, query, 4, IndexFilter("here", base_model, frozenset(only)))

    def test_only_no_adapters_finds_nothing(self, index: VectorIndex) -> None:
        index.put(entries(5))
        assert index.search(list(unit_vectors(2, 1)), 3, IndexFilter("here", only=frozenset())) == [[], []]

    def test_only_the_farthest_adapters(self, index: VectorIndex) -> None:
        held = entries(600)
        index.put(held)
        query = held[0].vector
        order = sorted(held, key=lambda entry: -float(entry.vector @ query))
        for part in (300, 20):
            only = frozenset(entry.adapter_id for entry in order[-part:])
            assert_finds(index, held, query, 5, IndexFilter("here", "base", only))

    def test_tens_of_thousands_of_wanted_adapters(self, index: VectorIndex) -> None:
        held = entries(60, first=10)
        index.put(held)
        allowed = IndexFilter("here", "base", frozenset(range(40, 40_000)))
        assert_finds(index, held, held[0].vector, 50, allowed)

    def test_excluded_adapters_make_room_for_others(self, index: VectorIndex) -> None:
        held = entries(100)
        index.put(held)
        query = unit_vectors(1, 5)[0]
        nearest = [int(key.partition("-")[0]) for key, _ in expected(held, query, 60, _HERE)]
        for excluded in (
            nearest[:1],
            nearest[:3],
            nearest[:60],
            nearest[1:30:2],
            [12345],
            range(1, 101),
            range(40_000),
        ):
            assert_finds(index, held, query, 5, IndexFilter("here", "base", exclude=frozenset(excluded)))

    def test_several_vectors_of_an_excluded_adapter_do_not_crowd_out_the_rest(self, index: VectorIndex) -> None:
        near = unit_vectors(1, 5)[0]
        held = [*entries(10), *(Entry(777, number, "here", "base", near) for number in range(40))]
        index.put(held)
        assert_finds(index, held, near, 6, IndexFilter("here", "base", exclude=frozenset({777})))

    def test_exclude_wins_over_only(self, index: VectorIndex) -> None:
        held = entries(30)
        index.put(held)
        allowed = IndexFilter("here", "base", frozenset({1, 2, 3}), frozenset({2}))
        assert {key for [found] in [index.search([held[1].vector], 9, allowed)] for key, _ in found} == {
            held[0].key,
            held[2].key,
        }
        nothing = IndexFilter("here", "base", frozenset({2}), frozenset({2}))
        assert index.search([held[1].vector], 9, nothing) == [[]]

    def test_a_count_beyond_the_pool_gives_the_pool(self, index: VectorIndex) -> None:
        held = entries(7)
        index.put(held)
        assert_finds(index, held, held[2].vector, 5000, _HERE)

    def test_putting_twice_changes_nothing(self, index: VectorIndex) -> None:
        held = entries(5)
        index.put(held)
        index.put([*held, held[0]])
        assert index.count() == 5
        assert_finds(index, held, held[0].vector, 10, _HERE)

    def test_keys_count_and_read_agree(self, index: VectorIndex) -> None:
        held = [*entries(40), *entries(40, seed=1, namespace="there", first=100)]
        index.put(held)
        keys = {entry.key for entry in held}
        assert index.keys() == keys
        assert index.count() == len(keys)
        read = index.read([*keys, "5555-1"])
        assert read.keys() == keys
        for entry in held:
            assert read[entry.key].dtype == np.float32
            # Chroma gives back what it normalised once more.
            np.testing.assert_allclose(read[entry.key], entry.vector, atol=1e-6)

    def test_deleted_vectors_are_gone_and_unknown_keys_ignored(self, index: VectorIndex) -> None:
        held = [*entries(40), *entries(40, seed=1, namespace="there", first=100)]
        index.put(held)
        index.delete({held[0].key, held[50].key, "5555-1"})
        index.delete([held[0].key])
        left = [entry for entry in held if entry not in (held[0], held[50])]
        assert index.keys() == {entry.key for entry in left}
        assert index.count() == 78
        assert index.read([held[0].key]) == {}
        assert_finds(index, left, held[0].vector, 50, _HERE)
        assert_finds(index, left, held[50].vector, 50, IndexFilter("there"))

    def test_what_was_deleted_can_come_back(self, index: VectorIndex) -> None:
        held = entries(10)
        index.put(held)
        index.delete([entry.key for entry in held])
        assert index.count() == 0
        assert index.search([held[0].vector], 3, _HERE) == [[]]
        index.put(held[:4])
        assert_finds(index, held[:4], held[0].vector, 10, _HERE)

    def test_equal_vectors_all_score_the_same(self, index: VectorIndex) -> None:
        vector = unit_vectors(1, 3)[0]
        index.put([Entry(number, number, "here", "base", vector) for number in range(1, 31)])
        [found] = index.search([vector], 10, _HERE)
        assert len({key for key, _ in found}) == 10
        np.testing.assert_allclose([score for _, score in found], 1.0, atol=1e-5)
        assert len(index.search([vector], 40, _HERE)[0]) == 30

    def test_the_stamp_is_what_was_said_last(self, index: VectorIndex) -> None:
        assert index.stamp() is None
        for version in (3, 2**40, 7):
            index.set_stamp(version)
            assert index.stamp() == version
        index.put(entries(2))
        assert index.stamp() == 7

    def test_a_stamp_of_nothing_at_all_is_kept_too(self, index: VectorIndex) -> None:
        index.set_stamp(0)
        assert index.stamp() == 0
        assert index.count() == 0

    def test_clear_leaves_nothing_and_what_follows_works(self, index: VectorIndex) -> None:
        held = [*entries(10), *entries(10, seed=1, namespace="there", first=100)]
        index.put(held)
        index.set_stamp(4)
        index.clear()
        assert index.stamp() is None
        assert index.count() == 0
        assert index.keys() == set()
        assert index.search([held[0].vector], 3, IndexFilter("here", "base")) == [[]]
        index.clear()
        index.put(held[5:])
        index.set_stamp(5)
        assert index.stamp() == 5
        assert_finds(index, held[5:], held[0].vector, 20, _HERE)

    def test_threads_may_read_and_write_at_once(self, index: VectorIndex) -> None:
        standing = entries(120)
        index.put(standing)
        nearest = expected(standing, standing[0].vector, 1, _HERE)[0][0]
        rounds = threading.Barrier(6)

        def write(number: int) -> None:
            rounds.wait()
            for turn in range(4):
                own = entries(15, seed=50 + number, base_model=f"base {number}", first=1000 * (number + 1) + 20 * turn)
                index.put(own)
                index.delete([entry.key for entry in own[::2]])

        def read() -> None:
            rounds.wait()
            for _ in range(12):
                [found] = index.search([standing[0].vector], 3, IndexFilter("here", "base"))
                assert found[0][0] == nearest
                assert len(index.search([standing[0].vector], 3, _HERE)[0]) == 3
                assert index.count() >= 120
                assert {entry.key for entry in standing} <= index.keys()

        with ThreadPoolExecutor(6) as pool:
            tasks = [pool.submit(write, number) for number in range(3)] + [pool.submit(read) for _ in range(3)]
            for task in tasks:
                task.result()
        assert index.count() == len(index.keys()) == 120 + 3 * 4 * 7

    def test_any_sequence_of_steps_agrees_with_a_dictionary(self, index: VectorIndex) -> None:
        # Defined here, because Hypothesis refuses one test that runs in several subclasses.
        @settings(max_examples=12, deadline=None)
        @given(steps=_STEPS)
        def agrees(steps: list[_Step]) -> None:
            _follow(index, steps)

        agrees()


def _follow(index: VectorIndex, steps: list[_Step]) -> None:
    index.clear()
    pool = unit_vectors(40, 21)
    namespaces, bases = ("here", "there", "here"), ("base", "base", "other")
    held: dict[str, Entry] = {}
    for action, adapter, number, place, count in steps:
        # An adapter keeps its place, and a key its vector, as the contract has it.
        spot = adapter % 3
        entry = Entry(adapter, number, namespaces[spot], bases[spot], pool[adapter * 3 + number])
        if action == "put":
            index.put([entry])
            held.setdefault(entry.key, entry)
        elif action == "delete":
            index.delete([entry.key])
            held.pop(entry.key, None)
        else:
            near = frozenset(range(adapter, adapter + 4))
            allowed = (
                IndexFilter("here"),
                IndexFilter("here", "base", only=near),
                IndexFilter("here", exclude=near),
            )[place]
            assert_finds(index, list(held.values()), pool[adapter], count, allowed)
    assert index.keys() == held.keys()
    assert index.count() == len(held)
