"""Two hubs on one registry whose calls meet in the worst moment, one moment a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from lora_hub_sdk.errors import ConflictError, PinnedError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import LocalHub
from tests.registry.grounds import Grounds
from tests.registry.report import collect, content_of

_REPO = "user/lora"


@pytest.fixture
def grounds(tmp_path: Path, base: Path) -> Iterator[Grounds]:
    with LocalHub() as server:
        made = Grounds(tmp_path, base, server)
        made.publish(_REPO)
        yield made


@pytest.fixture
def opened(grounds: Grounds) -> Iterator[Callable[..., LoraHub]]:
    """Opens hubs on one registry, each as another process would."""
    hubs: list[LoraHub] = []

    def open_one(index: str = "exact") -> LoraHub:
        hubs.append(replace(grounds.place, index=index).open(f"hub {len(hubs)}"))
        return hubs[-1]

    yield open_one
    for hub in hubs:
        hub.close()


def seen(hub: LoraHub) -> list[str]:
    return [hit.adapter.name for hit in hub.search("one", k=5)]


def test_an_adapter_that_came_back_is_found_by_one_who_never_noticed_that_it_was_away(
    grounds: Grounds, opened: Callable[..., LoraHub], chroma_server: str
) -> None:
    one, two, three = (opened(chroma_server) for _ in range(3))
    one.register(_REPO, samples=["one"])
    assert seen(one) == seen(two) == seen(three) == [_REPO]
    one.retire(_REPO)
    assert seen(two) == []  # which takes its vector from the index
    one.restore(_REPO)
    assert seen(three) == [_REPO]
    assert seen(two) == [_REPO]
    assert all(hub.verify().agrees for hub in (one, two, three))


def test_a_collection_leaves_whole_what_is_pulled_while_it_runs(
    grounds: Grounds, opened: Callable[..., LoraHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils._cache_manager import DeleteCacheStrategy

    collector, puller = opened(), opened()
    old, new = grounds.repositories[_REPO]
    collector.register(_REPO, revision=old, samples=["one"])
    collector.remove(_REPO)
    registering = threading.Thread(target=puller.register, args=[_REPO], kwargs={"revision": new, "samples": ["one"]})
    execute = DeleteCacheStrategy.execute

    def delayed(strategy: DeleteCacheStrategy) -> None:
        # Now it is decided which files go. The other revision shares one of them.
        registering.start()
        registering.join(1.0)
        execute(strategy)

    monkeypatch.setattr(DeleteCacheStrategy, "execute", delayed)
    assert len(collector.gc().commits) == 1
    registering.join()
    adapter = puller.get(_REPO)
    assert content_of(adapter.folder) == grounds.contents[_REPO, new]


def test_a_collection_tells_repositories_apart_that_share_a_commit(
    grounds: Grounds, opened: Callable[..., LoraHub]
) -> None:
    hub, names = opened(), [f"user/fork-{number}" for number in range(6)]
    grounds.fork(names)
    kept, *gone = [hub.register(name, samples=["one"]) for name in names]
    assert {adapter.revision for adapter in gone} == {kept.revision}
    for adapter in gone:
        hub.remove(adapter.name)
    collected = collect(hub, grounds.place.cache)
    assert len(collected.freed.commits) == len(gone)
    assert collected.leftovers == []
    assert content_of(kept.folder) == grounds.contents[kept.name, kept.revision]


def test_a_place_found_for_one_revision_is_never_noted_for_another(
    grounds: Grounds, opened: Callable[..., LoraHub]
) -> None:
    one, two = opened(), opened()
    old, new = grounds.repositories[_REPO]
    before = one.register(_REPO, revision=old, samples=["one"])
    after = two.update(_REPO, revision=new)
    with pytest.raises(ConflictError):
        one._registry.store.move(before, before.folder)
    assert one.get(_REPO) == after


def test_an_update_that_began_before_a_pin_moves_nothing_after_it(
    grounds: Grounds, opened: Callable[..., LoraHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = opened(), opened()
    old, new = grounds.repositories[_REPO]
    one.register(_REPO, revision=old, samples=["one"])
    pull = type(one._source).pull

    def pinned_meanwhile(*args: Any, **options: Any) -> Any:
        two.pin(_REPO)
        return pull(*args, **options)

    monkeypatch.setattr(type(one._source), "pull", pinned_meanwhile)
    with pytest.raises((PinnedError, ConflictError)):
        one.update(_REPO, revision=new)
    assert one.get(_REPO).revision == old


def test_two_who_note_their_pulls_at_once_wait_for_each_other(
    grounds: Grounds, opened: Callable[..., LoraHub], tmp_path: Path
) -> None:
    one, two = opened(), opened()
    one.register(_REPO, samples=["one"])
    writing = [True]

    def meanwhile(_: Any, __: Any, statement: str, *___: Any) -> None:
        # A transaction that has read may write no more once another one has written, so none may begin by reading.
        if writing and not statement.startswith(("DELETE", "INSERT", "UPDATE")) and "pulls" in statement:
            writing.clear()
            two.record_score(_REPO, "task", "metric", 0.5)

    event.listen(one._registry._engine, "after_cursor_execute", meanwhile)
    one._registry.store.note_pull(tmp_path / "somewhere", _REPO, "a" * 40)
    one._registry.store.note_pull(tmp_path / "somewhere", _REPO, "a" * 40)
    assert [pull.folder for pull in one._registry.store.pulls()].count(str(tmp_path / "somewhere")) == 1
