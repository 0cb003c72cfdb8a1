"""SQL and the vector index together, with vectors made by hand, on every database and every index."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_hub_sdk.errors import (
    AdapterNotFoundError,
    ConfigurationError,
    ConflictError,
    EncoderMismatchError,
    NameTakenError,
    RetiredError,
)
from lora_hub_sdk.registry.index import Vector
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.types import AdapterFilter, Hit, MinScore
from tests.registry.entries import ENCODER, entry, unit

X = unit(1, 0, 0)
Open = Callable[..., Registry]

#: Each database with each kind of index that goes with it in practice.
PLACES = ["file", "file-exact", "file-server", "memory", "postgres", "postgres-exact", "postgres-server"]


@pytest.fixture(params=PLACES)
def open_registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens registries on one database and one index; closes what is left open."""
    database, _, index = request.param.partition("-")
    where = {"file": str(tmp_path / "hub.db"), "memory": ":memory:"}.get(database)
    where = where or request.getfixturevalue("postgres")
    place = {"exact": "exact", "server": None}.get(index, None if database != "postgres" else str(tmp_path / "index"))
    if index == "server":
        place = request.getfixturevalue("chroma_server")
    opened: list[Registry] = []

    def open_one(**options: Any) -> Registry:
        opened.append(Registry(where, **{"index": place, "encoder": lambda: ENCODER, "actor": "ann", **options}))
        return opened[-1]

    yield open_one
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Registry]:
    """For what depends on neither database nor index."""
    registry = Registry(str(tmp_path / "hub.db"), index="exact", encoder=lambda: ENCODER, actor="ann")
    yield registry
    registry.close()


def search(registry: Registry, vector: Vector, k: int = 9, **options: Any) -> list[Hit]:
    return registry.search([vector], k, AdapterFilter(**options))[0]


def names(registry: Registry, vector: Vector = X, k: int = 9, **options: Any) -> list[str]:
    return [hit.adapter.name for hit in search(registry, vector, k, **options)]


# -- searching ------------------------------------------------------------------------------------------------------


def test_nearest_first_by_cosine(registry: Registry) -> None:
    for name, vector in (("far", unit(0, 1, 0)), ("near", unit(1, 0.1, 0)), ("middle", unit(1, 1, 0))):
        registry.add(entry(name, vector))
    hits = registry.search([X, unit(0, 1, 0)], 2, AdapterFilter())
    assert [[hit.adapter.name for hit in row] for row in hits] == [["near", "middle"], ["far", "middle"]]
    assert hits[0][1].score == pytest.approx(0.5**0.5, abs=1e-5)


def test_k_larger_than_the_pool_gives_the_pool_and_an_empty_one_nothing(registry: Registry) -> None:
    assert search(registry, X, 5) == []
    registry.add(entry("only", X))
    assert names(registry, k=100) == ["only"]


def test_equal_scores_come_in_the_order_of_names_also_at_the_edge(registry: Registry) -> None:
    for name in ("delta", "alpha", "Echo", "charlie", "bravo"):
        registry.add(entry(name, unit(1, 2, 3)))
    assert names(registry, k=3) == ["Echo", "alpha", "bravo"]


def test_filters_leave_nothing_else_through(registry: Registry) -> None:
    registry.add(entry("a", X, tags=("fr",), card_tags=("short",)))
    registry.add(entry("b", unit(1, 0.1, 0), tags=("fr",), license="Apache-2.0", origin="card"))
    registry.add(entry("c", unit(1, 0.2, 0), base_model="other", license=None, origin="guess"))
    registry.add(entry("d", unit(1, 0.3, 0), namespace="team"))
    assert names(registry) == ["a", "b", "c"]
    assert names(registry, base_model="base") == ["a", "b"]
    assert names(registry, exclude=("a", "nobody")) == ["b", "c"]
    assert names(registry, tags=("fr",)) == ["a", "b"]
    assert names(registry, tags=("fr", "short")) == ["a"]
    assert names(registry, tags=("fr",), exclude=("a",)) == ["b"]
    assert names(registry, tags=("nobody's",)) == []
    assert names(registry, licenses=("apache-2.0",)) == ["b"]
    assert names(registry, licenses=("apache-2.0", "mit"), exclude=("b",)) == ["a"]
    assert names(registry, min_trust="medium") == ["a", "b"]
    assert names(registry, min_trust="high") == ["a"]
    assert names(registry, namespace="team") == ["d"]
    assert names(registry, namespace="nobody's") == []
    assert [hit.trust for hit in search(registry, X)] == ["high", "medium", "low"]


def test_scores_are_a_filter_for_the_content_that_was_measured(registry: Registry) -> None:
    good, bad = registry.add(entry("good", X)), registry.add(entry("bad", X))
    registry.add(entry("unknown", X))
    registry.record_score(good, "sst2", "em", 0.9)
    registry.record_score(bad, "sst2", "em", 0.2)
    registry.record_score(bad, "sst2", "f1", 0.95)
    wanted = (MinScore("sst2", "em", 0.8),)
    assert names(registry, scores=wanted) == ["good"]
    registry.record_score(bad, "sst2", "em", 0.8)  # measured again, with a better result
    assert names(registry, scores=wanted) == ["bad", "good"]
    assert names(registry, scores=(*wanted, MinScore("sst2", "f1", 0.9))) == ["bad"]
    registry.replace(good, entry("good", None, digest="f" * 64, revision="b" * 40))
    assert names(registry, scores=wanted) == ["bad"]
    (old,) = registry.scores(registry.get("good", "default"))
    assert (old.value, old.current, old.revision) == (0.9, False, "a" * 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "0.5", None])
def test_scores_that_are_no_numbers_are_refused(plain: Registry, value: Any) -> None:
    adapter = plain.add(entry("a", X))
    with pytest.raises(ConfigurationError, match="finite number"):
        plain.record_score(adapter, "sst2", "em", value)
    with pytest.raises(ConfigurationError, match="needs a task"):
        plain.record_score(adapter, " ", "em", 1.0)
    assert plain.scores(adapter) == []


def test_exact_against_numpy(registry: Registry) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(60, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for place, vector in enumerate(vectors):
        registry.add(entry(f"a{place:02}", vector))
    queries = [unit(*query) for query in vectors[:10] + 0.2 * draw.normal(size=(10, 16))]
    for query, hits in zip(queries, registry.search(queries, 5, AdapterFilter()), strict=True):
        scores = vectors @ query
        order = np.argsort(-scores)[:5]
        assert [hit.adapter.name for hit in hits] == [f"a{place:02}" for place in order]
        assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)


# -- registering and changing -----------------------------------------------------------------------------------------


def test_registering_the_same_again_changes_nothing(registry: Registry) -> None:
    first = registry.add(entry("a", X))
    digest = registry.digest
    assert registry.add(entry("a", X)) == first
    assert registry.digest == digest
    assert registry.verify().vectors == 1
    assert [event.action for event in registry.events(None, None, 9)] == ["registered"]


def test_a_name_belongs_to_one_content_in_each_namespace(registry: Registry) -> None:
    registry.add(entry("a", X))
    with pytest.raises(NameTakenError, match="remove it first"):
        registry.add(entry("a", X, digest="f" * 64))
    with pytest.raises(NameTakenError, match="other samples"):
        registry.add(entry("a", unit(0, 1, 0), samples=("three",)))
    with pytest.raises(NameTakenError, match="other samples"):
        registry.add(entry("a", unit(0, 1, 0), samples=(), origin="owner"))
    assert registry.add(entry("a", X, namespace="team")).namespace == "team"
    assert registry.namespaces() == ["default", "team"]


def test_samples_that_were_not_kept_are_compared_by_their_vector(plain: Registry) -> None:
    kept = plain.add(entry("a", X, samples=()))
    assert plain.add(entry("a", X, samples=("one", "two"))) == kept
    with pytest.raises(NameTakenError, match="another vector"):
        plain.add(entry("a", unit(0, 1, 0), samples=("one", "two")))


def test_threads_that_register_the_same_end_with_one_and_with_other_content_with_an_error(registry: Registry) -> None:
    def add(number: int) -> str:
        try:
            return str(registry.add(entry("a", X, digest=f"{number % 2}" * 64)).id)
        except NameTakenError:
            return "taken"

    with ThreadPoolExecutor(8) as pool:
        ends = list(pool.map(add, range(16)))
    assert len({end for end in ends if end != "taken"}) == 1
    assert ends.count("taken") == 8
    assert names(registry) == ["a"]


def test_removal_reaches_sql_and_index_and_history_stays(registry: Registry) -> None:
    registry.add(entry("a", X))
    registry.add(entry("b", unit(0, 1, 0)))
    assert names(registry) == ["a", "b"]
    before = registry.digest
    registry.remove("a", "default")
    assert names(registry) == ["b"]
    assert registry.verify().agrees
    assert registry.verify().vectors == 1
    assert registry.digest != before
    with pytest.raises(AdapterNotFoundError):
        registry.remove("a", "default")
    assert [event.action for event in registry.events("a", "default", 9)] == ["removed", "registered"]


def test_a_missing_adapter_is_named_with_those_that_look_alike(plain: Registry) -> None:
    plain.add(entry("sentiment", X))
    with pytest.raises(AdapterNotFoundError, match="sentiment"):
        plain.get("sentimant", "default")


def test_a_vector_belongs_to_one_encoder(plain: Registry) -> None:
    with pytest.raises(EncoderMismatchError):
        plain.add(entry("a", X, encoder="f" * 64))


def test_texts_keep_their_order_and_every_letter(registry: Registry) -> None:
    texts = ("z", "a", "Ünïcödé 猫 🐈", "line\nbreak", "'; drop table adapters; --")
    adapter = registry.add(entry("náme 猫", X, samples=texts, tags=("t'ag", "猫"), description="d\u2028d"))
    assert registry.samples(adapter) == texts
    assert adapter.sample_count == len(texts)
    assert registry.get("náme 猫", "default") == adapter
    assert adapter.tags == ("t'ag", "猫")
    assert names(registry, tags=("猫",)) == ["náme 猫"]


def test_an_update_switches_everything_at_once_and_keeps_what_was_given(registry: Registry) -> None:
    old = registry.add(entry("a", X, tags=("mine",), card_tags=("old", "mine"), description="my own"))
    assert names(registry) == ["a"]
    new = registry.replace(
        old,
        entry("a", None, digest="f" * 64, revision="b" * 40, license="cc0", card_tags=("new",), tags=("mine",),
              description="my own"),
    )  # fmt: skip
    assert (new.id, new.revision, new.digest, new.license) == (old.id, "b" * 40, "f" * 64, "cc0")
    assert (new.tags, new.description) == (("new", "mine"), "my own")
    assert registry.samples(new) == registry.samples(old)
    (hit,) = search(registry, X)
    assert hit.adapter == new
    assert registry.verify().agrees
    assert new.updated_at > new.created_at == old.created_at


def test_an_update_may_bring_other_samples(registry: Registry) -> None:
    old = registry.add(entry("a", X))
    other = registry.add(entry("b", unit(1, 1, 0)))
    assert names(registry) == ["a", "b"]
    new = registry.replace(old, entry("a", unit(0, 1, 0), digest="f" * 64, samples=("three",)))
    assert registry.samples(new) == ("three",)
    assert names(registry) == ["b", "a"]
    assert names(registry, unit(0, 1, 0)) == ["a", "b"]
    assert registry.verify().agrees
    assert registry.get("b", "default") == other


def test_of_two_updates_at_once_none_is_lost(registry: Registry) -> None:
    known = registry.add(entry("a", X))
    first = registry.replace(known, entry("a", None, digest="1" * 64, revision="b" * 40))
    with pytest.raises(ConflictError, match="update it again"):
        registry.replace(known, entry("a", None, digest="2" * 64, revision="c" * 40))
    assert registry.get("a", "default") == first
    registry.remove("a", "default")
    with pytest.raises(AdapterNotFoundError):
        registry.replace(first, entry("a", None, digest="3" * 64))


def test_retired_adapters_are_kept_and_never_found(registry: Registry) -> None:
    registry.add(entry("a", X))
    registry.add(entry("b", unit(1, 1, 0)))
    assert names(registry) == ["a", "b"]
    assert registry.set_state("a", "default", "retired").state == "retired"
    assert names(registry) == ["b"]
    assert registry.verify().agrees
    assert registry.get("a", "default").state == "retired"
    with pytest.raises(RetiredError, match=r"hub\.restore"):
        registry.in_service("a", "default")
    version = registry.digest
    registry.set_state("a", "default", "retired")
    assert registry.digest == version
    registry.set_state("a", "default", "active")
    assert names(registry) == ["a", "b"]
    assert registry.in_service("a", "default").state == "active"


def test_events_tell_who_did_what(open_registry: Open) -> None:
    first, second = open_registry(), open_registry(actor="bob")
    if first.store.registry_id != second.store.registry_id:
        pytest.skip("a database in memory is nobody else's")
    adapter = first.add(entry("a", X))
    second.set_pinned("a", "default", True)
    second.record_score(adapter, "sst2", "em", 0.5)
    first.add(entry("b", X, namespace="team"))
    told = [(event.actor, event.action, event.namespace, event.name) for event in first.events(None, None, 9)]
    assert told == [
        ("ann", "registered", "team", "b"),
        ("bob", "scored", "default", "a"),
        ("bob", "pinned", "default", "a"),
        ("ann", "registered", "default", "a"),
    ]
    assert first.events("a", None, 1)[0].detail == {"task": "sst2", "metric": "em", "value": 0.5}
    assert [event.name for event in first.events(None, "team", 9)] == ["b"]


# -- agreement of SQL and index -----------------------------------------------------------------------------------


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    for _ in range(2):
        registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
        adapter = registry.add(entry("a", X))
        assert names(registry) == ["a"]
        assert adapter.created_at.tzinfo is not None
        registry.close()


def test_a_deleted_index_is_made_anew_from_sql(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    for place in range(5):
        registry.add(entry(f"a{place}", unit(1, place, 0)))
    assert len(names(registry)) == 5
    registry.close()
    shutil.rmtree(tmp_path / "hub.db.index")
    registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    assert len(names(registry)) == 5
    assert registry.verify().agrees
    registry.close()


@pytest.mark.parametrize("damage", ["delete", "overwrite", "truncate"])
def test_an_index_damaged_under_an_open_registry_costs_nothing(tmp_path: Path, damage: str) -> None:
    registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    for place in range(5):
        registry.add(entry(f"a{place}", unit(1, place, 0)))
    assert len(names(registry)) == 5
    folder = tmp_path / "hub.db.index"
    if damage == "delete":
        shutil.rmtree(folder)
    else:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                file.write_bytes(b"\0" * (file.stat().st_size if damage == "overwrite" else 0))
    registry.add(entry("later", unit(1, -1, 0)))
    assert names(registry, k=3) == ["a0", "a1", "later"]
    registry.close()
    again = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    assert len(names(again)) == 6
    assert again.verify().agrees
    again.close()


def test_registries_that_share_a_folder_mend_what_one_threw_away(tmp_path: Path) -> None:
    one, other = (
        Registry(str(tmp_path / name), index=tmp_path / "index", encoder=lambda: ENCODER) for name in ("1.db", "2.db")
    )
    for registry in (one, other):
        registry.add(entry("a", X))
        assert names(registry) == ["a"]
    one._follower._forget()
    one._follower._index.clear()  # as it does where files are damaged
    for registry in (one, other, one, other):
        registry.add(entry(f"b{registry.store.version()}", unit(0, 1, 0)))
        assert names(registry)[0] == "a"
        assert registry.verify().agrees
    one.close()
    other.close()


@pytest.mark.parametrize("step", ["put", "delete", "set_stamp"])
def test_an_interruption_while_the_index_follows_is_mended_by_the_next_search(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    registry.add(entry("before", unit(0, 1, 0)))
    assert names(registry) == ["before"]

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    registry.add(entry("during", X))
    registry.remove("before", "default")
    with monkeypatch.context() as patch:
        patch.setattr(type(registry._follower._index), step, crash)
        with pytest.raises(KeyboardInterrupt):
            names(registry)
    assert names(registry) == ["during"]
    assert registry.verify().agrees


def test_verify_finds_every_kind_of_disagreement_and_mends_none(registry: Registry) -> None:
    for place in range(4):
        registry.add(entry(f"a{place}", unit(1, place, 0)))
    assert registry.verify().agrees
    index = registry._follower._index
    gone, changed, *_ = sorted(index.keys())
    (entries,) = registry.store.entries([changed])
    index.delete([gone, changed])
    index.put([type(entries[0])(entries[0].adapter_id, entries[0].embedding_id, "default", "base", unit(9, 9, 9))])
    index.put([type(entries[0])(entries[0].adapter_id, 999, "default", "base", unit(9, 9, 9))])
    for _ in range(2):
        found = registry.verify()
        assert not found.agrees
        assert (found.missing, found.changed) == ((gone,), (changed,))
        assert [key.endswith("-999") for key in found.surplus] == [True]
    assert registry.reindex() == 4
    assert registry.verify().agrees


def test_what_the_index_should_not_have_is_never_found(registry: Registry) -> None:
    registry.add(entry("mine", unit(1, 1, 0)))
    theirs = registry.add(entry("theirs", unit(0, 1, 0), namespace="team"))
    assert names(registry) == ["mine"]
    index = registry._follower._index
    (entries,) = registry.store.entries(registry.store.keys(ENCODER, [theirs.id]))
    kind = type(entries[0])
    # As a damaged or hostile index might claim: adapters that nobody registered, and another namespace's here.
    index.put([kind(number, number, "default", "base", X) for number in range(900, 950)])
    assert names(registry) == ["mine"]
    assert registry.verify().agrees, "a search that met such keys has the index compared and mended"
    index.put([kind(theirs.id, entries[0].embedding_id, "default", "base", X)])
    assert names(registry) == ["mine"]
    assert names(registry, namespace="team") == ["theirs"]
    assert registry.verify().agrees


def test_two_registries_on_one_database_see_each_others_writes(open_registry: Open) -> None:
    first, second = open_registry(), open_registry()
    if first.store.registry_id != second.store.registry_id:
        pytest.skip("a database in memory is nobody else's")
    adapter = first.add(entry("a", X))
    assert names(second) == ["a"]
    second.add(entry("b", unit(1, 0.1, 0)))
    first.add(entry("c", unit(1, 0.2, 0)))
    assert names(first) == names(second) == ["a", "b", "c"]
    second.remove("b", "default")
    assert names(first) == ["a", "c"]
    first.replace(adapter, entry("a", unit(0, 1, 0), digest="f" * 64, samples=("three",)))
    assert names(second) == names(first) == ["c", "a"]
    second.set_state("c", "default", "retired")
    assert names(first) == ["a"]
    assert first.digest == second.digest
    assert first.verify().agrees
    assert second.verify().agrees


def test_a_crash_before_sql_commits_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry.add(entry("a", X))
    with monkeypatch.context() as patch:
        patch.setattr("lora_hub_sdk.registry.store.embedding_row", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.add(entry("b", unit(0, 1, 0)))
        with pytest.raises(ZeroDivisionError):
            registry.replace(known, entry("a", unit(0, 1, 0), digest="f" * 64))
    assert registry.adapters() == [known]
    assert names(registry, unit(0, 1, 0)) == ["a"]
    assert [event.action for event in registry.events(None, None, 9)] == ["registered"]


def test_searches_go_on_while_others_write(registry: Registry) -> None:
    registry.add(entry("stays", X))
    stop, failures = threading.Event(), list[str]()

    def churn() -> None:
        try:
            for number in range(30):
                registry.add(entry(f"n{number}", unit(1, 0.01, 0)))
                if number % 2:
                    registry.remove(f"n{number}", "default")
        finally:
            stop.set()

    writer = threading.Thread(target=churn)
    writer.start()
    while not stop.is_set():
        if names(registry)[:1] != ["stays"]:
            failures.append("the nearest adapter was not found")
        # A database in memory has one connection, which somebody without pauses would never let go to another.
        stop.wait(0.001)
    writer.join()
    assert failures == []
    assert len(names(registry, k=99)) == 16
    assert registry.verify().agrees


def test_adapters_of_another_encoder_wait_to_be_embedded(open_registry: Open) -> None:
    first, second = open_registry(), open_registry(encoder=lambda: "f" * 64)
    if first.store.registry_id != second.store.registry_id:
        pytest.skip("a database in memory is nobody else's")
    first.add(entry("a", X))
    first.add(entry("owner", X, samples=(), origin="owner"))
    with pytest.raises(EncoderMismatchError, match="reindex"):
        names(second, unit(1, 0))
    waiting, private = second.store.without_embedding("f" * 64)
    second.store.add_embedding(waiting, "f" * 64, "other", unit(1, 0))
    assert names(second, unit(1, 0)) == ["a"]
    assert second.verify().unembedded == (private.name,)
    assert names(first) == ["a", "owner"]


def test_an_update_of_samples_leaves_no_vector_of_another_encoder(open_registry: Open) -> None:
    registry = open_registry()
    adapter = registry.add(entry("a", X))
    registry.store.add_embedding(adapter, "f" * 64, "other", unit(1, 0))
    registry.replace(adapter, entry("a", unit(0, 1, 0), samples=("three",)))
    assert registry.store.vector(adapter, "f" * 64) is None
    registry.store.add_embedding(adapter, "f" * 64, "other", unit(0, 1))
    registry.replace(registry.get("a", "default"), entry("a", None, digest="1" * 64))
    assert registry.store.vector(adapter, "f" * 64) is not None
