"""SQL and the vector index together, with vectors made by hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_hub_sdk.errors import AdapterNotFoundError, EncoderMismatchError, NameTakenError
from lora_hub_sdk.registry.adapter_config import AdapterConfig
from lora_hub_sdk.registry.admission import Admitted
from lora_hub_sdk.registry.registry import Registry
from lora_hub_sdk.registry.source import Pulled
from lora_hub_sdk.registry.store import Registration, Vector

ENCODER = "e" * 64


def unit(*values: float) -> Vector:
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def entry(name: str, vector: Vector, **changes: Any) -> Registration:
    admitted = Admitted(AdapterConfig("base", 4, 8.0), changes.pop("digest", name.ljust(64, "0")), ("m.q_proj",), 10)
    fields: dict[str, Any] = {
        "name": name,
        "namespace": "default",
        "pulled": Pulled(f"user/{name}", "a" * 40, Path("/nowhere"), "mit", None, (), False),
        "admitted": admitted,
        "base_model": "base",
        "description": None,
        "tags": (),
        "samples": ("one", "two"),
        "vector": vector,
        "origin": "samples",
        "encoder": ENCODER,
        "encoder_name": "hand",
    }
    return Registration(**{**fields, **changes})


@pytest.fixture(params=["hub.db", ":memory:"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    name = request.param if request.param == ":memory:" else str(tmp_path / request.param)
    opened = Registry(name, index=None, encoder=lambda: ENCODER)
    yield opened
    opened.close()


def names(registry: Registry, vector: Vector, k: int = 9, **options: Any) -> list[str]:
    return [hit.adapter.name for hit in registry.search([vector], k, namespace="default", **options)[0]]


def test_nearest_first_by_cosine(registry: Registry) -> None:
    for name, vector in (("far", unit(0, 1, 0)), ("near", unit(1, 0.1, 0)), ("middle", unit(1, 1, 0))):
        registry.add(entry(name, vector))
    hits = registry.search([unit(1, 0, 0), unit(0, 1, 0)], 2, namespace="default")
    assert [[hit.adapter.name for hit in row] for row in hits] == [["near", "middle"], ["far", "middle"]]
    assert hits[0][1].score == pytest.approx(0.5**0.5, abs=1e-5)


def test_k_larger_than_the_pool_gives_the_pool_and_an_empty_one_nothing(registry: Registry) -> None:
    assert registry.search([unit(1, 0, 0)], 5, namespace="default") == [[]]
    registry.add(entry("only", unit(1, 0, 0)))
    assert names(registry, unit(1, 0, 0), k=100) == ["only"]


def test_equal_scores_come_in_the_order_of_names_also_at_the_edge(registry: Registry) -> None:
    for name in ("delta", "alpha", "echo", "charlie", "bravo"):
        registry.add(entry(name, unit(1, 2, 3)))
    assert names(registry, unit(1, 0, 0), k=3) == ["alpha", "bravo", "charlie"]


def test_filters(registry: Registry) -> None:
    registry.add(entry("a", unit(1, 0, 0), tags=("fr", "short")))
    registry.add(entry("b", unit(1, 0.1, 0), tags=("fr",)))
    registry.add(entry("c", unit(1, 0.2, 0), base_model="other"))
    registry.add(entry("d", unit(1, 0.3, 0), namespace="team"))
    query = unit(1, 0, 0)
    assert names(registry, query) == ["a", "b", "c"]
    assert names(registry, query, base_model="base") == ["a", "b"]
    assert names(registry, query, exclude=("a",)) == ["b", "c"]
    assert names(registry, query, tags=("fr",)) == ["a", "b"]
    assert names(registry, query, tags=("fr", "short")) == ["a"]
    assert names(registry, query, tags=("fr",), exclude=("a",)) == ["b"]
    assert names(registry, query, tags=("nobody's",)) == []
    assert [hit.adapter.name for hit in registry.search([query], 9, namespace="team")[0]] == ["d"]


def test_registering_the_same_again_changes_nothing(registry: Registry) -> None:
    first = registry.add(entry("a", unit(1, 0, 0)))
    digest = registry.digest
    assert registry.add(entry("a", unit(1, 0, 0))) == first
    assert registry.digest == digest
    assert registry.verify().vectors == 1


def test_a_name_belongs_to_one_content(registry: Registry) -> None:
    registry.add(entry("a", unit(1, 0, 0)))
    with pytest.raises(NameTakenError, match="remove it first"):
        registry.add(entry("a", unit(1, 0, 0), digest="f" * 64))
    with pytest.raises(NameTakenError, match="other samples"):
        registry.add(entry("a", unit(1, 0, 0), samples=("three",)))
    assert registry.add(entry("a", unit(1, 0, 0), namespace="team")).namespace == "team"


def test_removal_reaches_sql_and_index(registry: Registry) -> None:
    registry.add(entry("a", unit(1, 0, 0)))
    registry.add(entry("b", unit(0, 1, 0)))
    before = registry.digest
    registry.remove("a", "default")
    assert names(registry, unit(1, 0, 0)) == ["b"]
    assert registry.verify().agrees
    assert registry.verify().vectors == 1
    assert registry.digest != before
    with pytest.raises(AdapterNotFoundError):
        registry.remove("a", "default")


def test_a_missing_adapter_is_named_with_those_that_look_alike(registry: Registry) -> None:
    registry.add(entry("sentiment", unit(1, 0, 0)))
    with pytest.raises(AdapterNotFoundError, match="sentiment"):
        registry.get("sentimant", "default")


def test_a_vector_belongs_to_one_encoder(registry: Registry) -> None:
    with pytest.raises(EncoderMismatchError):
        registry.add(entry("a", unit(1, 0, 0), encoder="f" * 64))


def test_samples_are_kept_in_order(registry: Registry) -> None:
    adapter = registry.add(entry("a", unit(1, 0, 0), samples=("z", "a", "m")))
    assert registry.samples(adapter) == ("z", "a", "m")
    assert adapter.sample_count == 3


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    for _ in range(2):
        registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
        adapter = registry.add(entry("a", unit(1, 0, 0)))
        assert names(registry, unit(1, 0, 0)) == ["a"]
        assert adapter.created_at.tzinfo is not None
        registry.close()


def test_a_deleted_index_is_made_anew_from_sql(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    for place in range(5):
        registry.add(entry(f"a{place}", unit(1, place, 0)))
    registry.close()
    shutil.rmtree(tmp_path / "hub.db.index")
    registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    assert not registry.verify().agrees
    assert len(names(registry, unit(1, 0, 0))) == 5
    assert registry.verify().agrees
    registry.close()


def test_a_crash_between_sql_and_index_is_mended_on_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    registry.add(entry("before", unit(0, 1, 0)))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(registry._index), "put", crash)
        with pytest.raises(KeyboardInterrupt):
            registry.add(entry("during", unit(1, 0, 0)))
        patch.setattr(type(registry._index), "delete", crash)
        with pytest.raises(KeyboardInterrupt):
            registry.remove("before", "default")
    # The same process goes on, and so does the next one.
    assert not registry.verify().agrees
    assert names(registry, unit(1, 0, 0))[0] == "during"
    assert registry.verify().agrees
    registry.close()


def test_two_registries_on_one_database_see_each_others_writes(tmp_path: Path) -> None:
    first, second = (Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER) for _ in range(2))
    first.add(entry("a", unit(1, 0, 0)))
    assert names(second, unit(1, 0, 0)) == ["a"]
    second.add(entry("b", unit(1, 0.1, 0)))
    first.add(entry("c", unit(1, 0.2, 0)))
    assert names(first, unit(1, 0, 0)) == names(second, unit(1, 0, 0)) == ["a", "b", "c"]
    second.remove("a", "default")
    assert names(first, unit(1, 0, 0)) == ["b", "c"]
    assert first.digest == second.digest
    first.close()
    second.close()


def test_a_crash_before_sql_commits_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add(entry("a", unit(1, 0, 0)))
    with monkeypatch.context() as patch:
        patch.setattr("lora_hub_sdk.registry.store._bytes", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.add(entry("b", unit(0, 1, 0)))
    assert [adapter.name for adapter in registry.adapters()] == ["a"]
    assert names(registry, unit(0, 1, 0)) == ["a"]


def test_reindex_writes_every_vector_anew(registry: Registry) -> None:
    for place in range(3):
        registry.add(entry(f"a{place}", unit(1, place, 0)))
    registry._index.delete(list(registry._index.keys())[:1])
    assert registry.reindex() == 3
    assert registry.verify().agrees


def test_adapters_of_another_encoder_wait_to_be_embedded(tmp_path: Path) -> None:
    first = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: ENCODER)
    first.add(entry("a", unit(1, 0, 0)))
    first.close()
    second = Registry(str(tmp_path / "hub.db"), index=None, encoder=lambda: "f" * 64)
    with pytest.raises(EncoderMismatchError, match="reindex"):
        names(second, unit(1, 0))
    (waiting,) = second.unembedded()
    second.add_embedding(waiting, "other", unit(1, 0))
    assert names(second, unit(1, 0)) == ["a"]
    second.close()


def test_exact_against_numpy(registry: Registry) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(60, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for place, vector in enumerate(vectors):
        registry.add(entry(f"a{place:02}", vector))
    queries = list(vectors[:10] + 0.2 * draw.normal(size=(10, 16)).astype(np.float32))
    for query, hits in zip(queries, registry.search(queries, 5, namespace="default"), strict=True):
        scores = vectors @ query / np.linalg.norm(query)
        order = np.argsort(-scores)[:5]
        assert [hit.adapter.name for hit in hits] == [f"a{place:02}" for place in order]
        assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=1e-5)
