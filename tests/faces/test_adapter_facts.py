"""What strangers are told of adapters and errors names no folder of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_hub_sdk.errors import AdapterChangedError, ConfigurationError, LoraHubError, ModelNotFoundError, StorageError
from lora_hub_sdk.faces.adapter_facts import adapter_facts, described, error_text, hit_facts, purpose, route_facts
from lora_hub_sdk.faces.hub_tools import hub_id
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.testing import LocalHub, tiny_adapter
from lora_hub_sdk.types import Routing, Sampling
from tests.encoders import Hashing


@pytest.fixture
def pool(open_hub: Callable[..., LoraHub]) -> LoraHub:
    return open_hub(encoder=Hashing("one"))


def test_facts_are_json_and_name_no_folder(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "here" / "sums", base, seed=1)
    pool.register(folder, samples=["1 + 2"], tags=["maths"], description="adds")
    pool.record_score("sums", "sums", "accuracy", 0.5)
    (hit,) = pool.search("3 + 4", base_model=base)
    (route,) = pool.route(["3 + 4"], base_model=base, routing=Routing(k=1))
    told = json.dumps([hit_facts(hit), described(pool, "sums", "default"), route_facts(route)])
    assert str(tmp_path) not in told
    assert str(base.parent) not in told
    assert str(tmp_path) in json.dumps(route.as_dict())
    facts = adapter_facts(hit.adapter)
    assert (facts["repo_id"], facts["base_model"], facts["tags"]) == (None, base.name, ["maths"])
    assert described(pool, "sums", "default")["scores"] == [
        {"task": "sums", "metric": "accuracy", "value": 0.5, "current": True}
    ]


def test_an_adapter_of_the_hub_keeps_its_repository(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    with LocalHub() as server:
        server.publish("user/sums", tiny_adapter(tmp_path / "sums", base))
        hub = open_hub(encoder=Hashing("one"), endpoint=server.url)
        facts = adapter_facts(hub.register("user/sums", samples=["1 + 2"]))
    assert facts["repo_id"] == "user/sums"


def test_samples_tell_what_an_adapter_without_a_description_is_for(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    silent = pool.register(tiny_adapter(tmp_path / "sums", base), samples=["1 +\n2", "x" * 999, "5 + 6"])
    assert purpose(pool, silent) == f"For prompts like: 1 + 2 | {'x' * 200}..."
    told = pool.register(tiny_adapter(tmp_path / "other", base, seed=2), samples=["a"], description="adds")
    assert purpose(pool, told) == "adds"
    pool.remove("sums")
    assert purpose(pool, silent) == ""


def test_an_error_of_changed_files_names_no_folder(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "my adapters" / "sums", base)
    pool.register(folder, samples=["1 + 2"])
    shutil.rmtree(folder)
    with pytest.raises(AdapterChangedError) as caught:
        pool.generate(["3 + 4"], base_model=base, sampling=Sampling(max_new_tokens=1))
    text = error_text(caught.value)
    assert "register it again" in text
    assert "my adapters" not in text
    assert tmp_path.name not in text


def test_an_error_of_a_missing_base_names_no_folder(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.register(tiny_adapter(tmp_path / "sums", base), samples=["1 + 2"])
    asked = tmp_path / "my bases" / "none"
    with pytest.raises(ModelNotFoundError) as caught:
        pool.generate(["3 + 4"], base_model=asked, routing=Routing("base"))
    assert "my bases" in str(caught.value)
    assert "my bases" not in error_text(caught.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no folder '/srv/my files/x' here", "no folder 'x' here"),
        ("gone from /srv/adapters/x (no such file); again", "gone from x (no such file); again"),
        ("see /srv/adapters/x.", "see x."),
        (r"gone from C:\adapters\x", "gone from x"),
        ("in ~/adapters/x: none", "in x: none"),
        ('base "/srv/models/base/"', 'base "base"'),
        ("user/lora-x is not on https://huggingface.co/models", "user/lora-x is not on https://huggingface.co/models"),
        ("1/2 of sst2/accuracy and/or ./here", "1/2 of sst2/accuracy and/or ./here"),
    ],
)
def test_paths_lose_all_but_their_last_part(said: str, told: str) -> None:
    assert error_text(LoraHubError(said)) == told


def test_troubles_inside_are_not_told() -> None:
    assert "db.internal" not in error_text(StorageError("postgresql://db.internal:5432/hubs: no answer"))


@pytest.mark.parametrize("reference", ["/etc", "..", "a/b/c", "~/x", "x", "owner/../x", "owner/na me", "owner/x\n", ""])
def test_what_could_be_a_folder_is_no_repository(reference: str) -> None:
    with pytest.raises(ConfigurationError):
        hub_id(reference)


def test_a_folder_that_looks_like_a_repository_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ConfigurationError):
        hub_id("owner/name")
