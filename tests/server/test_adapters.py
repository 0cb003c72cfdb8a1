"""``/v1/adapters``: listing, searching, registering and removing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import LocalHub, tiny_adapter
from tests.encoders import Hashing
from tests.server.conftest import SAMPLES
from tests.server.serving import Served, serving


def test_a_list_comes_in_pages_by_name(served: Served) -> None:
    def page(**asked: Any) -> tuple[list[str], bool]:
        found = httpx.get(f"{served.url}/v1/adapters", params=asked).json()
        return [one["name"] for one in found["data"]], found["has_more"]

    assert page() == (sorted(SAMPLES), False)
    assert page(limit=2) == (["french", "maths"], True)
    assert page(limit=2, after="maths") == (["poems"], False)
    assert page(after="zzz") == ([], False)
    for bad in ({"limit": 0}, {"limit": "many"}, {"limit": 10**30}, {"after": "a" * 600}):
        answer = httpx.get(f"{served.url}/v1/adapters", params=bad)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in bad


def test_a_search_tells_the_nearest(served: Served) -> None:
    found = httpx.post(f"{served.url}/v1/adapters/search", json={"query": SAMPLES["maths"][0], "k": 2}).json()["data"]
    assert found[0]["adapter"]["name"] == "maths"
    assert len(found) == 2
    assert found[0]["score"] >= found[1]["score"]
    excluded = {"query": SAMPLES["maths"][0], "exclude": ["maths"]}
    again = httpx.post(f"{served.url}/v1/adapters/search", json=excluded).json()["data"]
    assert {one["adapter"]["name"] for one in again} == {"french", "poems"}


def test_one_adapter_is_described_without_its_folder(served: Served, filled: LoraHub) -> None:
    answer = httpx.get(f"{served.url}/v1/adapters/maths")
    found = answer.json()
    assert (found["name"], found["repo_id"], found["base_model"]) == ("maths", None, "tiny-chat")
    assert found["examples"] == SAMPLES["maths"]
    assert str(filled.get("maths").folder.parent) not in answer.text
    for name in ("nobody", "a%00b", "../maths", "a" * 2000):
        missing = httpx.get(f"{served.url}/v1/adapters/{name}")
        assert missing.status_code == 404, missing.text


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[tuple[Served, LoraHub]]:
    """A server whose registry may change, and is empty again after each test, beside a Hub that has an adapter."""
    tmp_path = tmp_path_factory.mktemp("growing")
    with LocalHub() as remote:
        remote.publish("user/lora-x", tiny_adapter(tmp_path / "x", base))
        remote.publish("user/no-adapter", base)
        options: dict[str, Any] = {"endpoint": remote.url, "cache_dir": tmp_path / "cache"}
        with (
            LoraHub(tmp_path / "hub.db", encoder=Hashing("one"), **options) as hub,
            serving(hub, base_model=str(base)) as served,
        ):
            yield served, hub


def test_an_adapter_comes_and_goes(growing: tuple[Served, LoraHub]) -> None:
    served, hub = growing
    body = {"repo_id": "user/lora-x", "samples": ["What is 12 + 30?"], "tags": ["numbers"], "name": "team/sums"}
    made = httpx.post(f"{served.url}/v1/adapters", json=body, timeout=60)
    assert made.status_code == 201, made.text
    assert made.json()["repo_id"] == "user/lora-x"
    assert hub.get("team/sums").tags == ("numbers",)
    asked = {"model": "team/sums", "prompt": "What is 1 + 1?", "max_tokens": 1}
    assert httpx.post(f"{served.url}/v1/completions", json=asked).status_code == 200
    gone = httpx.delete(f"{served.url}/v1/adapters/team/sums")
    assert gone.json() == {"object": "adapter.deleted", "name": "team/sums", "deleted": True}
    assert httpx.delete(f"{served.url}/v1/adapters/team/sums").status_code == 404
    assert httpx.post(f"{served.url}/v1/completions", json=asked).status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        {"repo_id": "user/nothing"},
        {"repo_id": "user/no-adapter"},
        {"repo_id": "/etc"},
        {"repo_id": "../x"},
        {"repo_id": "~/x"},
        {"repo_id": "x"},
        {"repo_id": "user/lora-x", "revision": "nowhere"},
        {"repo_id": "user/lora-x", "revision": "../../etc"},
        {"repo_id": "user/lora-x", "samples": []},
        {"repo_id": "user/lora-x", "samples": [" "]},
        {"repo_id": "user/lora-x", "embedding": [0.1, 0.2]},
        {"repo_id": "user/lora-x", "samples": ["a"], "embedding": [0.1] * 48},
        {"repo_id": "user/lora-x", "base_model": "other/base"},
        {"repo_id": "user/lora-x", "name": " "},
    ],
    ids=str,
)
def test_what_cannot_be_registered_is_refused(growing: tuple[Served, LoraHub], fields: dict[str, Any]) -> None:
    served, hub = growing
    answer = httpx.post(f"{served.url}/v1/adapters", json=fields, timeout=60)
    assert answer.status_code == 400, answer.text
    assert hub.list() == []


def test_no_folder_of_the_server_can_be_registered(
    growing: tuple[Served, LoraHub], tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, hub = growing
    tiny_adapter(tmp_path / "inside" / "adapter", base)
    monkeypatch.chdir(tmp_path)
    answer = httpx.post(f"{served.url}/v1/adapters", json={"repo_id": "inside/adapter"}, timeout=60)
    assert answer.status_code == 400
    assert hub.list() == []
