"""The active encoder in SQL: when it is recorded, when another one may take its place, and what must be of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete
from sqlalchemy.orm import Session

from lora_hub_sdk.errors import AdapterNotFoundError, ConflictError, EncoderMismatchError
from lora_hub_sdk.registry.queries import ENCODER
from lora_hub_sdk.registry.records import EncoderRecord
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.tables import MetaRow
from lora_hub_sdk.types import AdapterFilter
from tests.registry.entries import ENCODER as FIRST
from tests.registry.entries import entry, unit

SECOND, THIRD = "f" * 64, "d" * 64
X, Y = unit(1, 0, 0), unit(0, 1, 0)
Open = Callable[..., Registry]


@pytest.fixture(params=["file", "memory", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    known = {"file": str(tmp_path / "hub.db"), "memory": ":memory:"}
    return known.get(request.param) or str(request.getfixturevalue("postgres"))


@pytest.fixture
def open_registry(database: str) -> Iterator[Open]:
    """Opens registries with an encoder of the caller's; closes them."""
    opened: list[Registry] = []

    def open_one(encoder: Callable[[], str] = lambda: FIRST) -> Registry:
        opened.append(Registry(database, index="exact", encoder=encoder, actor="ann"))
        return opened[-1]

    yield open_one
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


def found(registry: Registry, vector: Any, encoder: str) -> list[str]:
    return [hit.adapter.name for hit in registry.search([vector], 9, AdapterFilter(), encoder)[0]]


def test_the_first_vector_that_is_registered_names_the_encoder(registry: Registry) -> None:
    assert registry.store.active_encoder() is None
    first = entry("a", X)
    assert first.representation is not None
    told = replace(first.representation, reference="user/encoder", instruction="Find: ")
    registry.add(replace(first, representation=told))
    record = EncoderRecord(FIRST, "hand", "user/encoder", "Find: ")
    assert registry.store.active_encoder() == record
    registry.add(entry("b", Y))
    assert registry.store.active_encoder() == record


def test_a_vector_of_another_encoder_is_refused_within_the_transaction(registry: Registry) -> None:
    known = registry.add(entry("a", X))
    version = registry.store.version()
    with pytest.raises(EncoderMismatchError, match="switch_encoder"):
        registry.store.add(entry("b", Y, encoder=SECOND))
    with pytest.raises(EncoderMismatchError, match="nothing was written"):
        registry.store.replace(known, entry("a", Y, encoder=SECOND, revision="b" * 40))
    assert registry.store.version() == version
    assert [adapter.name for adapter in registry.adapters()] == ["a"]
    assert registry.get("a", "default") == known
    # An update that keeps the vectors is of no encoder.
    assert registry.store.replace(known, entry("a", None, revision="b" * 40)).revision == "b" * 40


def test_an_encoder_becomes_active_only_when_every_adapter_has_its_vector(registry: Registry) -> None:
    a, b = registry.add(entry("a", X)), registry.add(entry("b", Y))
    registry.set_state("b", "default", "retired")
    record, before = EncoderRecord(SECOND, "second"), registry.store.active_encoder()
    registry.store.add_embedding(a, SECOND, "second", unit(1, 0))
    version = registry.store.version()
    with pytest.raises(ConflictError, match="'b'"):
        registry.store.activate(record)
    assert (registry.store.version(), registry.store.active_encoder()) == (version, before)
    registry.store.add_embedding(b, SECOND, "second", unit(0, 1))
    registry.store.activate(record)
    assert registry.store.active_encoder() == record
    with pytest.raises(EncoderMismatchError):
        registry.add(entry("c", X))
    (event,) = registry.events("second", None, 9)
    assert (event.action, event.actor, event.detail) == ("switched", "ann", {"before": FIRST, "encoder": SECOND})
    assert registry.store.version() == version + 2 == len(registry.events(None, None, 99))


def test_a_registry_without_adapters_can_be_switched(registry: Registry) -> None:
    registry.store.activate(EncoderRecord(SECOND, "second"))
    with pytest.raises(EncoderMismatchError):
        registry.add(entry("a", X))
    assert registry.adapters() == []


def test_a_registry_of_an_earlier_version_names_no_encoder_that_its_adapters_lack(open_registry: Open) -> None:
    first = open_registry()
    first.add(entry("a", X))

    def forget(registry: Registry) -> None:
        with Session(registry._engine) as session, session.begin():
            session.execute(delete(MetaRow).where(MetaRow.key == ENCODER))

    forget(first)
    first.store.add(entry("b", Y, encoder=SECOND))  # as versions before allowed
    assert first.store.active_encoder() is None
    first.remove("b", "default")
    first.add(entry("c", Y))
    active = first.store.active_encoder()
    assert active is not None
    assert active.fingerprint == FIRST


def test_a_vector_made_from_samples_that_were_replaced_is_refused(registry: Registry) -> None:
    known = registry.add(entry("a", X, samples=("one", "two")))
    registry.replace(known, entry("a", Y, samples=("three",)))
    with pytest.raises(ConflictError, match="other samples"):
        registry.store.add_embedding(known, SECOND, "second", unit(1, 0), texts=("one", "two"))
    assert registry.store.vector(known, SECOND) is None
    registry.store.add_embedding(known, SECOND, "second", unit(1, 0), texts=("three",))
    assert registry.store.vector(known, SECOND) is not None


def test_a_vector_guessed_from_files_that_were_replaced_is_refused(registry: Registry) -> None:
    known = registry.add(entry("a", X, samples=(), origin="guess"))
    registry.replace(known, entry("a", Y, samples=(), origin="guess", revision="b" * 40))
    with pytest.raises(ConflictError, match="revision"):
        registry.store.add_embedding(known, SECOND, "second", unit(1, 0), texts=())
    registry.remove("a", "default")
    with pytest.raises(AdapterNotFoundError):
        registry.store.add_embedding(known, SECOND, "second", unit(1, 0), texts=())


def test_each_encoder_has_an_index_of_its_own_and_few_stay_open(open_registry: Open) -> None:
    asked = [FIRST]
    registry = open_registry(encoder=lambda: asked[-1])
    for name, vector in (("a", X), ("b", Y)):
        adapter = registry.add(entry(name, vector))
        # Two dimensions where the first encoder has three: a mixed search could not even be computed.
        for encoder, turned in ((SECOND, unit(*vector[:2])), (THIRD, unit(*vector[1::-1]))):
            registry.store.add_embedding(adapter, encoder, encoder, turned)
    for _ in range(2):
        assert found(registry, X, FIRST) == ["a", "b"]
        assert found(registry, unit(1, 0), SECOND) == ["a", "b"]
        assert found(registry, unit(1, 0), THIRD) == ["b", "a"]
        assert len(registry._followers._open) == 2
    asked.append(SECOND)
    assert registry.verify().vectors == 2
    assert registry.digest.endswith(SECOND[:16])


def test_an_index_that_is_in_use_stays_open_whatever_others_open(open_registry: Open) -> None:
    registry = open_registry()
    adapter = registry.add(entry("a", X))
    for encoder in (SECOND, THIRD):
        registry.store.add_embedding(adapter, encoder, encoder, unit(1, 0))
    with registry._followers.lend(FIRST) as follower:
        for encoder in (SECOND, THIRD, SECOND):
            assert found(registry, unit(1, 0), encoder) == ["a"]
        assert registry._followers._open[FIRST] is follower
    assert found(registry, X, FIRST) == ["a"]


def test_threads_under_several_encoders_never_meet_in_one_index(open_registry: Open) -> None:
    registry, encoders = open_registry(), [FIRST, SECOND, THIRD]
    random = np.random.default_rng(0)
    spaces = {encoder: random.standard_normal((8, 3 + place)) for place, encoder in enumerate(encoders)}
    for number in range(8):
        adapter = registry.add(entry(str(number), unit(*spaces[FIRST][number])))
        for encoder in encoders[1:]:
            registry.store.add_embedding(adapter, encoder, encoder, unit(*spaces[encoder][number]))

    def ask(turn: int) -> bool:
        encoder, number = encoders[turn % 3], turn % 8
        return found(registry, unit(*spaces[encoder][number]), encoder)[0] == str(number)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(96)))
