"""Finding adapters on a local Hub, through the real client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.errors import (
    ConfigurationError,
    DownloadError,
    OutOfBoundsError,
    RepoAccessError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.models.names import SMOLLM2
from lora_hub_sdk.registry.admission import Limits
from lora_hub_sdk.registry.discovery import Candidate, discover
from lora_hub_sdk.registry.source import HubSource
from lora_hub_sdk.testing import LocalHub

BASE = "base/small"
TOKEN = "hf_TheSecretOfAnn"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": BASE}


def adapter(folder: Path, *, base: str = BASE, config: bytes | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nbase_model: {base}\nlicense: mit\ntags: [lora]\n---\n")
    (folder / "adapter_config.json").write_bytes(config or json.dumps({**CONFIG, **changes}).encode())
    return folder


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(token=TOKEN, page_size=3) as hub:
        yield hub


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been slept."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def found(hub: LocalHub, base: str = BASE, **options: Any) -> list[Candidate]:
    return discover(base, endpoint=hub.url, **options)


def names(candidates: list[Candidate]) -> list[str]:
    return [candidate.repo_id.rpartition("/")[2] for candidate in candidates]


# -- what is found -------------------------------------------------------------------------------------------


def test_a_candidate_tells_what_its_configuration_says_at_one_commit(hub: LocalHub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", rank_pattern={"q_proj": 16})
    sha = hub.publish("ann/sst2", folder, downloads=7, likes=3)
    hub.publish("bob/other", adapter(tmp_path / "b", base="base/large", base_model_name_or_path="base/large"))
    assert found(hub) == [
        Candidate(
            repo_id="ann/sst2",
            revision=sha,
            base_model=BASE,
            peft_type="LORA",
            rank=16,
            alpha=8.0,
            license="mit",
            tags=("lora", "license:mit", "base_model:base/small", "base_model:adapter:base/small"),
            downloads=7,
            likes=3,
        )
    ]


def test_a_short_name_of_a_base_model_finds_the_same(hub: LocalHub, tmp_path: Path) -> None:
    short = SMOLLM2.name
    hub.publish("ann/a", adapter(tmp_path / "a", base=SMOLLM2.hub_id, base_model_name_or_path=short))
    hub.publish("ann/b", adapter(tmp_path / "b", base=SMOLLM2.hub_id, base_model_name_or_path=SMOLLM2.hub_id))
    assert names(found(hub, short)) == names(found(hub, SMOLLM2.hub_id)) == ["a", "b"]
    assert {candidate.base_model for candidate in found(hub, short)} == {SMOLLM2.hub_id}


def test_the_most_downloaded_come_first_over_many_pages(hub: LocalHub, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    for number in range(20):
        hub.publish(f"ann/lora-{number}", folder, downloads=number)
    assert names(found(hub, limit=100)) == [f"lora-{number}" for number in reversed(range(20))]
    assert names(found(hub, limit=2)) == ["lora-19", "lora-18"]
    assert names(found(hub, query="lora-1", limit=3)) == ["lora-19", "lora-18", "lora-17"]
    assert found(hub, query="nothing") == []


# -- what is refused -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "of-another-base": ({"base_model_name_or_path": "base/large"}, "base/large"),
    "without-a-base": ({"base_model_name_or_path": None}, "base model ''"),
    "of-a-folder-here": ({"base_model_name_or_path": "."}, "base model"),
    "of-a-user-here": ({"base_model_name_or_path": "~nobody-at-all"}, "~nobody-at-all"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "not-lora": ({"peft_type": "IA3"}, "IA3"),
    "no-rank": ({"r": 0}, "r is 0"),
    "too-large": ({"r": 100_000}, "100000"),
}


def test_what_a_tag_promises_is_checked_and_the_scan_goes_on(hub: LocalHub, tmp_path: Path) -> None:
    for number, (name, (changes, _)) in enumerate(REFUSED.items()):
        hub.publish(f"ann/{name}", adapter(tmp_path / name, **changes), downloads=100 - number)
    hub.publish("ann/no-json", adapter(tmp_path / "no-json", config=b"[1"), downloads=50)
    hub.publish("ann/deep", adapter(tmp_path / "deep", config=b"[" * 100_000), downloads=49)
    hub.publish("ann/huge", adapter(tmp_path / "huge", config=b" " * 1_000_001), downloads=48)
    (adapter(tmp_path / "bare") / "adapter_config.json").unlink()
    (tmp_path / "bare" / "README.md").write_text(f"---\nbase_model: {BASE}\nbase_model_relation: adapter\n---\n")
    hub.publish("ann/bare", tmp_path / "bare", downloads=47)
    hub.publish("ann/gated", adapter(tmp_path / "gated"), downloads=46, gated=True)
    hub.publish("ann/good", adapter(tmp_path / "good"), downloads=45)
    hub.publish("ann/good-too", adapter(tmp_path / "good"), downloads=1)
    hub.publish("ann/last", adapter(tmp_path / "last", r=0))

    assert names(found(hub)) == ["good", "good-too"]
    everything = {candidate.repo_id.partition("/")[2]: candidate for candidate in found(hub, include_refused=True)}
    for name, (_, told) in REFUSED.items():
        assert told in str(everything[name].problem), name
    assert "1000000" in str(everything["huge"].problem)
    assert "JSON" in str(everything["no-json"].problem)
    assert "JSON" in str(everything["deep"].problem)
    assert "gated" in str(everything["gated"].problem)
    assert everything["bare"].problem
    assert everything["not-lora"].peft_type == "IA3"
    assert list(everything)[-1] == "last"
    assert names(found(hub, limit=1, include_refused=True))[-1] == "good"
    assert names(found(hub, limit=3, limits=Limits(max_rank=100_000)))[0] == "too-large"


def test_no_more_repositories_are_looked_at_than_allowed(hub: LocalHub, tmp_path: Path) -> None:
    bad, good = adapter(tmp_path / "bad", r=0), adapter(tmp_path / "good")
    for number in range(12):
        hub.publish(f"ann/bad-{number}", bad, downloads=9)
    hub.publish("ann/good", good)
    assert found(hub, max_scanned=12) == []
    assert len([path for _, path in hub.requests if path.endswith("adapter_config.json")]) == 12
    assert names(found(hub, max_scanned=13)) == ["good"]


@pytest.mark.parametrize("asked", ["", "  ", "."])
def test_a_base_model_without_a_hub_id_is_refused(hub: LocalHub, asked: str) -> None:
    with pytest.raises(ConfigurationError, match="Hub id"):
        found(hub, asked)
    assert hub.requests == []


@pytest.mark.parametrize("options", [{"limit": 0}, {"max_scanned": 0}, {"token": "two\nlines"}])
def test_arguments_that_make_no_sense(hub: LocalHub, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        found(hub, **options)


# -- trouble on the way --------------------------------------------------------------------------------------


def test_a_commit_is_believed_even_when_the_branch_moves_meanwhile(hub: LocalHub, tmp_path: Path) -> None:
    first = hub.publish("ann/a", adapter(tmp_path / "a"))
    worse = adapter(tmp_path / "worse", r=0)
    hub.after(1, lambda: hub.publish("ann/a", worse))
    (candidate,) = found(hub)
    assert (candidate.revision, candidate.rank) == (first, 4)
    assert found(hub) == []


@pytest.mark.parametrize("asked", [2, 9])
def test_an_overloaded_hub_is_left_alone_for_as_long_as_it_asks(
    hub: LocalHub, tmp_path: Path, no_waiting: list[float], asked: int
) -> None:
    hub.publish("ann/a", adapter(tmp_path / "a"))
    hub.fail(None, status=429, retry_after=asked, times=1)
    assert names(found(hub)) == ["a"]
    assert no_waiting == [asked]


def test_a_hub_that_asks_for_too_long_a_wait_is_given_up(hub: LocalHub, no_waiting: list[float]) -> None:
    hub.fail(None, status=429, retry_after=3600)
    with pytest.raises(DownloadError, match="429"):
        found(hub)
    assert no_waiting == []


@pytest.mark.usefixtures("no_waiting")
def test_one_broken_repository_costs_only_itself(hub: LocalHub, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        hub.publish(f"ann/{name}", adapter(tmp_path / name))
    hub.fail("ann/b", status=500)
    assert names(found(hub)) == ["a", "c"]


@pytest.mark.usefixtures("no_waiting")
def test_a_hub_that_only_lists_is_not_taken_for_an_empty_one(hub: LocalHub, tmp_path: Path) -> None:
    hub.publish("ann/a", adapter(tmp_path / "a"))
    hub.fail("ann/a", status=503)
    with pytest.raises(DownloadError, match="503"):
        found(hub)


def test_a_silent_hub_is_given_up(hub: LocalHub) -> None:
    hub.delay(30)
    with pytest.raises(DownloadError):
        found(hub, timeout=0.05)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_no_error_shows_the_token(hub: LocalHub, status: int) -> None:
    hub.fail(None, status=status)
    with pytest.raises((DownloadError, RepoAccessError, LookupError)) as caught:
        found(hub, token=TOKEN)
    assert TOKEN not in str(caught.value)


def test_private_adapters_are_found_with_a_token(hub: LocalHub, tmp_path: Path) -> None:
    hub.publish("ann/private", adapter(tmp_path / "a"), private=True)
    assert found(hub) == []
    assert names(found(hub, token=TOKEN)) == ["private"]


# -- the source underneath -----------------------------------------------------------------------------------


def test_a_file_is_read_at_its_commit_and_leaves_nothing_behind(hub: LocalHub, tmp_path: Path) -> None:
    first = hub.publish("ann/a", adapter(tmp_path / "a"))
    hub.publish("ann/a", adapter(tmp_path / "a", r=9))
    source = HubSource(endpoint=hub.url, cache_dir=tmp_path / "cache")
    content = source.fetch("ann/a", "adapter_config.json", first, max_bytes=1000)
    assert json.loads(content) == CONFIG
    assert source.fetch("ann/a", "adapter_config.json", first, max_bytes=len(content)) == content
    with pytest.raises(OutOfBoundsError, match="size"):
        source.fetch("ann/a", "adapter_config.json", first, max_bytes=len(content) - 1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", ".", ""])
def test_a_name_that_leads_elsewhere_is_never_asked_for(hub: LocalHub, name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="file name"):
        HubSource(endpoint=hub.url).fetch("ann/a", name, "main", max_bytes=10)
    assert hub.requests == []


@pytest.mark.usefixtures("no_waiting")
def test_an_answer_that_breaks_off_is_not_taken_for_the_whole(hub: LocalHub, tmp_path: Path) -> None:
    hub.publish("ann/a", adapter(tmp_path / "a"))
    hub.truncate("ann/a", "adapter_config.json", keep=5, times=1)
    source = HubSource(endpoint=hub.url)
    assert json.loads(source.fetch("ann/a", "adapter_config.json", "main", max_bytes=1000)) == CONFIG
    hub.truncate("ann/a", "adapter_config.json", keep=5)
    with pytest.raises(DownloadError):
        source.fetch("ann/a", "adapter_config.json", "main", max_bytes=1000)


def test_offline_pulls_what_is_in_the_cache_and_asks_nobody(hub: LocalHub, tmp_path: Path) -> None:
    (adapter(tmp_path / "a") / "adapter_model.safetensors").write_bytes(b"w" * 100)
    sha = hub.publish("ann/a", tmp_path / "a")
    hub.publish("ann/a", tmp_path / "a", branch="v1")
    online, offline = (
        HubSource(endpoint=hub.url, cache_dir=tmp_path / "cache", offline=value) for value in (False, True)
    )
    pulled = online.pull("ann/a")
    before = hub.requests
    assert offline.pull("ann/a").revision == offline.pull("ann/a", sha).revision == pulled.revision
    for repo_id, revision in (("ann/a", "v1"), ("ann/b", None), ("ann/b", "0" * 40)):
        with pytest.raises(DownloadError, match="offline mode"):
            offline.pull(repo_id, revision)
    with pytest.raises(DownloadError, match="offline mode"):
        offline.fetch("ann/a", "adapter_config.json", sha, max_bytes=1000)
    assert offline.pull(tmp_path / "a").is_local
    assert hub.requests == before


@pytest.mark.usefixtures("no_waiting")
def test_a_pinned_commit_that_is_not_in_the_cache_needs_the_hub(hub: LocalHub, tmp_path: Path) -> None:
    source = HubSource(endpoint=hub.url, cache_dir=tmp_path / "cache")
    hub.close()
    with pytest.raises(DownloadError, match="check the connection"):
        source.pull("ann/a", "0" * 40)
