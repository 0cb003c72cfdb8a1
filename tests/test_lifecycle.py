"""An adapter's life in a hub: many registered at once, updated, pinned, retired, scored, collected, pulled again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_hub_sdk import errors
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.intake import AdapterRequest
from lora_hub_sdk.registry.admission import Limits
from lora_hub_sdk.registry.gc import Freed
from lora_hub_sdk.testing import LocalHub, tiny_adapter
from lora_hub_sdk.types import MinScore, Routing, Sampling

TOKEN = "hf_TheTokenOfAnn"
FRENCH = ["Translate into French: good morning", "How do you say 'thank you' in French?"]
MATHS = ["What is 12 + 30?", "Add 4 and 9."]


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub(token=TOKEN) as started:
        yield started


@pytest.fixture
def hub(open_hub: Callable[..., LoraHub], server: LocalHub) -> LoraHub:
    return open_hub(endpoint=server.url, actor="ann")


@pytest.fixture
def publish(server: LocalHub, base: Path, tmp_path: Path) -> Callable[..., str]:
    """Publishes a tiny adapter as the next revision of a repository, with a card where one is given."""

    def put(repo_id: str, seed: int = 0, card: str = "", **options: Any) -> str:
        folder = tiny_adapter(tmp_path / "sources" / repo_id / str(seed), base, seed=seed)
        if card:
            (folder / "README.md").write_text(card)
        return server.publish(repo_id, folder, **options)

    return put


def answers(hub: LoraHub, base: Path, *names: str) -> list[str]:
    routing = Routing("mixture", adapters=names)
    prompts = ["Say something", "And something else"]
    completions = hub.generate(prompts, base_model=base, routing=routing, sampling=Sampling(max_new_tokens=8))
    return [completion.text for completion in completions]


# -- many at once -----------------------------------------------------------------------------------------------------


def test_one_that_fails_stops_no_other_and_a_second_run_goes_on(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], base: Path, tmp_path: Path
) -> None:
    for number in range(6):
        publish(f"user/lora-{number}", seed=number)
    publish("user/hidden", private=True)
    server.fail("user/lora-3", status=404, path="adapter_model.safetensors")
    broken = tiny_adapter(tmp_path / "broken", base)
    (broken / "adapter_config.json").write_text("{")
    asked: list[Any] = [
        *({"reference": f"user/lora-{number}", "samples": FRENCH, "tags": ["x"]} for number in range(6)),
        {"reference": "user/hidden", "samples": FRENCH},
        AdapterRequest(broken, samples=FRENCH),
        {"reference": "user/lora-0", "samples": FRENCH, "colour": "red"},
        {"samples": FRENCH},
    ]
    ended: list[str] = []
    outcomes = hub.register_many(asked, workers=4, on_done=lambda outcome: ended.append(outcome.reference))
    assert [outcome.adapter is not None for outcome in outcomes] == [
        number not in (3, 6, 7, 8, 9) for number in range(10)
    ]
    assert [type(outcome.error) for outcome in outcomes[6:]] == [
        errors.RepoHiddenError,
        errors.InvalidConfigError,
        errors.ConfigurationError,
        errors.ConfigurationError,
    ]
    assert isinstance(outcomes[3].error, errors.SourceError)
    assert sorted(ended) == sorted(outcome.reference for outcome in outcomes)
    server.heal()
    again = hub.register_many(asked[:6], workers=4)
    assert [outcome.error for outcome in again] == [None] * 6
    assert [outcome.adapter for outcome in again[:3]] == [outcome.adapter for outcome in outcomes[:3]]
    assert [event.action for event in hub.events()] == ["registered"] * 6
    with pytest.raises(errors.ConfigurationError, match="workers"):
        hub.register_many([], workers=0)


def test_no_token_reaches_log_error_or_database(
    open_hub: Callable[..., LoraHub],
    server: LocalHub,
    publish: Callable[..., str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    publish("user/private", private=True)
    publish("user/gated", gated=True)
    hub = open_hub(endpoint=server.url, token=TOKEN)
    outcomes = hub.register_many(
        [{"reference": f"user/{name}", "samples": FRENCH} for name in ("private", "gated", "missing")]
    )
    assert [outcome.error is None for outcome in outcomes] == [True, True, False]
    told = caplog.text + "".join(f"{outcome.error!r}{outcome.adapter!r}" for outcome in outcomes)
    hub.close()
    assert TOKEN not in told
    for file in [*tmp_path.rglob("hub.db*"), *(tmp_path / "cache").rglob("*")]:
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()
    stranger = open_hub(
        endpoint=server.url, token="hf_WrongTokenOfBob", database=tmp_path / "other.db", cache_dir=tmp_path / "empty"
    )
    with pytest.raises(errors.RepoAccessError) as refused:
        stranger.register("user/gated", samples=FRENCH)
    assert "hf_WrongTokenOfBob" not in str(refused.value)


def test_offline_serves_what_was_pulled_and_asks_nobody(
    open_hub: Callable[..., LoraHub], server: LocalHub, publish: Callable[..., str], hub: LoraHub, tmp_path: Path
) -> None:
    publish("user/lora")
    publish("user/never-pulled")
    hub.register("user/lora", samples=FRENCH)
    before = len(server.requests)
    offline = open_hub(endpoint=server.url, offline=True, database=tmp_path / "other.db")
    assert offline.register("user/lora", samples=FRENCH).revision == hub.get("user/lora").revision
    with pytest.raises(errors.DownloadError, match="offline"):
        offline.register("user/never-pulled", samples=FRENCH)
    assert len(server.requests) == before


# -- moving to another revision ---------------------------------------------------------------------------------------


def test_an_update_follows_the_branch_and_keeps_samples_and_the_old_until_it_is_done(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], base: Path
) -> None:
    old = publish("user/lora", seed=1)
    known = hub.register("user/lora", samples=FRENCH, tags=["mine"])
    before = answers(hub, base, "user/lora")
    assert hub.update("user/lora") == known
    new = publish("user/lora", seed=2, card="---\nlicense: mit\ntags: [new]\n---\n")
    server.fail("user/lora", status=404, path="adapter_model.safetensors")
    with pytest.raises(errors.SourceError):
        hub.update("user/lora")
    assert hub.get("user/lora") == known
    assert answers(hub, base, "user/lora") == before
    server.heal()
    updated = hub.update("user/lora")
    assert (updated.id, updated.revision, updated.license) == (known.id, new, "mit")
    assert updated.tags == ("new", "mine")
    assert hub.samples("user/lora") == tuple(FRENCH)
    assert answers(hub, base, "user/lora") != before
    back = hub.update("user/lora", revision=old)
    assert (back.revision, back.digest) == (known.revision, known.digest)
    assert answers(hub, base, "user/lora") == before
    assert hub.update("user/lora").revision == new, "a commit is not followed, the branch is"
    assert [event.action for event in hub.events("user/lora")] == ["updated"] * 3 + ["registered"]
    assert hub.events(limit=1)[0].detail == {"before": old, "revision": new}


def test_an_update_follows_another_branch_once_it_was_told_so(hub: LoraHub, publish: Callable[..., str]) -> None:
    publish("user/lora", seed=1)
    hub.register("user/lora", samples=FRENCH)
    publish("user/lora", seed=2, branch="next")
    assert hub.update("user/lora", revision="next").revision == hub.inspect("user/lora", revision="next").revision
    newest = publish("user/lora", seed=3, branch="next")
    assert hub.update("user/lora").revision == newest


def test_a_refused_revision_leaves_the_old_one(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], base: Path, tmp_path: Path
) -> None:
    publish("user/lora", seed=1)
    known = hub.register("user/lora", samples=FRENCH)
    folder = tiny_adapter(tmp_path / "bad", base, seed=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e9}))
    server.publish("user/lora", folder)
    with pytest.raises(errors.OutOfBoundsError):
        hub.update("user/lora")
    assert hub.get("user/lora") == known
    with pytest.raises(errors.AdapterNotFoundError):
        hub.update("user/nobody")


def test_an_update_may_bring_samples_alone(hub: LoraHub, publish: Callable[..., str]) -> None:
    publish("user/lora")
    known = hub.register("user/lora", samples=FRENCH)
    (before,) = hub.search("What is 3 + 4?")
    changed = hub.update("user/lora", samples=MATHS)
    assert (changed.revision, hub.samples("user/lora")) == (known.revision, tuple(MATHS))
    (after,) = hub.search("What is 3 + 4?")
    assert after.score > before.score + 0.2


def test_a_local_folder_is_updated_from_what_it_holds_now(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "mine", base, seed=1)
    known = hub.register(folder, samples=FRENCH)
    tiny_adapter(folder, base, seed=2)
    with pytest.raises(errors.AdapterChangedError):
        answers(hub, base, "mine")
    updated = hub.update("mine")
    assert updated.digest != known.digest
    assert answers(hub, base, "mine")


def test_a_folder_that_has_a_repositorys_name_is_not_taken_for_it(
    hub: LoraHub, publish: Callable[..., str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("user/lora", seed=1)
    known = hub.register("user/lora", samples=FRENCH)
    tiny_adapter(tmp_path / "here" / "user" / "lora", base, seed=2)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(errors.ConfigurationError, match="folder here too"):
        hub.update("user/lora")
    assert hub.get("user/lora") == known


def test_a_pinned_adapter_moves_when_it_is_unpinned(hub: LoraHub, publish: Callable[..., str]) -> None:
    publish("user/lora", seed=1)
    known = hub.register("user/lora", samples=FRENCH)
    assert hub.pin("user/lora").pinned
    new = publish("user/lora", seed=2)
    with pytest.raises(errors.PinnedError, match=r"hub\.unpin"):
        hub.update("user/lora")
    assert hub.get("user/lora").revision == known.revision
    assert not hub.unpin("user/lora").pinned
    assert hub.update("user/lora").revision == new


def test_a_retired_adapter_is_neither_found_nor_used_until_it_is_restored(
    hub: LoraHub, publish: Callable[..., str], base: Path
) -> None:
    publish("user/one", seed=1)
    publish("user/two", seed=2)
    hub.register("user/one", samples=FRENCH)
    hub.register("user/two", samples=FRENCH)
    assert len(hub.search(FRENCH[0])) == 2
    hub.retire("user/one")
    assert [hit.adapter.name for hit in hub.search(FRENCH[0])] == ["user/two"]
    with pytest.raises(errors.RetiredError):
        answers(hub, base, "user/one")
    assert [adapter.state for adapter in hub.list()] == ["retired", "active"]
    hub.retire("user/two")
    with pytest.raises(errors.NoAdaptersError):
        hub.generate(["x"], base_model=base)
    hub.restore("user/one")
    assert [hit.adapter.name for hit in hub.search(FRENCH[0])] == ["user/one"]
    assert answers(hub, base, "user/one")


@pytest.mark.parametrize("requests", range(1, 8))
def test_a_branch_that_moves_between_two_requests_gives_one_of_its_commits_whole(
    hub: LoraHub, server: LocalHub, base: Path, tmp_path: Path, requests: int
) -> None:
    folders = [tiny_adapter(tmp_path / str(seed), base, seed=seed, rank=2 + seed) for seed in range(2)]
    commits = {server.publish("user/lora", folders[0]): hub.inspect(folders[0]).digest}

    def move() -> None:
        commits[server.publish("user/lora", folders[1])] = hub.inspect(folders[1]).digest

    server.after(requests, move)
    adapter = hub.register("user/lora", samples=FRENCH)
    assert adapter.digest == commits[adapter.revision]
    assert hub.inspect(adapter.folder).digest == adapter.digest


# -- files ------------------------------------------------------------------------------------------------------------


def blobs(cache: Path) -> int:
    return sum(file.stat().st_size for file in cache.rglob("blobs/*") if file.is_file())


def test_gc_frees_what_nothing_refers_to_and_nothing_else(
    open_hub: Callable[..., LoraHub],
    hub: LoraHub,
    server: LocalHub,
    publish: Callable[..., str],
    base: Path,
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    publish("user/gone", seed=1)
    publish("user/moved", seed=2)
    publish("user/kept", seed=3)
    publish("somebody/elses", seed=4)
    other = open_hub(endpoint=server.url, database=tmp_path / "other.db")
    other.register("somebody/elses", samples=FRENCH)
    for name in ("user/gone", "user/moved", "user/kept", "somebody/elses"):
        hub.register(name, samples=FRENCH)
    local = hub.register(tiny_adapter(tmp_path / "local", base, seed=9), samples=FRENCH)
    assert hub.gc() == Freed(0, (), ())
    old = hub.get("user/moved")
    publish("user/moved", seed=5)
    hub.update("user/moved")
    for name in ("user/gone", "somebody/elses", "local"):
        hub.remove(name)
    hub.retire("user/kept")
    told, before = hub.gc(dry_run=True), blobs(cache)
    assert blobs(cache) == before
    freed = hub.gc()
    assert freed == told
    assert freed.size_bytes == before - blobs(cache) > 0
    assert [name.partition("@")[0] for name in freed.commits] == ["user/gone", "user/moved"]
    assert not old.folder.exists()
    assert not (cache / "models--user--gone").exists()
    assert local.folder.is_dir()
    assert hub.gc().size_bytes == 0
    hub.restore("user/kept")
    assert answers(hub, base, "user/kept", "user/moved")
    assert answers(other, base, "somebody/elses")


def test_gc_leaves_alone_what_is_being_registered(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("user/lora")
    seen: list[Freed] = []
    encode = type(hub.encoder).encode

    def collecting(self: Any, texts: list[str]) -> Any:
        seen.append(hub.gc())
        return encode(self, texts)

    monkeypatch.setattr(type(hub.encoder), "encode", collecting)
    adapter = hub.register("user/lora", samples=FRENCH)
    assert [(freed.size_bytes, len(freed.busy)) for freed in seen] == [(0, 1)]
    assert (adapter.folder / "adapter_model.safetensors").is_file()


def test_gc_frees_what_a_broken_download_left(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], tmp_path: Path
) -> None:
    publish("user/lora")
    server.truncate("user/lora", "adapter_model.safetensors", keep=500)
    with pytest.raises(errors.DownloadError):
        hub.register("user/lora", samples=FRENCH)
    left = blobs(tmp_path / "cache")
    assert hub.gc().size_bytes == left > 0
    assert not (tmp_path / "cache" / "models--user--lora").exists()
    server.heal()
    assert hub.register("user/lora", samples=FRENCH)


def test_files_that_somebody_took_from_the_cache_are_pulled_again_at_the_same_commit(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], base: Path, tmp_path: Path
) -> None:
    publish("user/lora", seed=1)
    known = hub.register("user/lora", samples=FRENCH)
    publish("user/lora", seed=2)
    shutil.rmtree(tmp_path / "cache")
    server.fail("user/lora", status=404)
    with pytest.raises(errors.AdapterChangedError, match="pulling it again failed"):
        answers(hub, base, "user/lora")
    server.heal()
    assert answers(hub, base, "user/lora")
    assert known.folder.is_dir()
    assert known.folder.name == known.revision


# -- where samples come from ------------------------------------------------------------------------------------------


def test_samples_come_from_the_card_and_are_trusted_less(hub: LoraHub, publish: Callable[..., str]) -> None:
    card = "---\nwidget:\n- text: 'Translate into French: the cat sleeps'\n- text: 'In French: good night'\n---\n"
    publish("user/lora", card=card)
    adapter = hub.register("user/lora")
    assert (adapter.origin, adapter.sample_count) == ("card", 2)
    assert hub.samples("user/lora") == ("Translate into French: the cat sleeps", "In French: good night")
    (hit,) = hub.search("Translate into French: the dog barks")
    assert hit.trust == "medium"
    assert hit.score > 0.5
    assert hub.search("x", min_trust="high") == []
    shy = hub.register("user/lora", name="shy", redact=lambda text: text.replace("cat", "pet"), keep_samples=False)
    assert (shy.sample_count, hub.samples("shy")) == (2, ())
    publish("user/lora", seed=2, card=card.replace("the cat sleeps", "the sun shines"))
    hub.update("user/lora")
    assert hub.samples("user/lora")[0] == "Translate into French: the sun shines"


def test_samples_come_from_a_dataset_that_the_card_names(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"inputs": f"What is {number} + 2?", "targets": str(number + 2)} for number in range(50)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server.publish_dataset("user/sums", data)
    publish("user/lora", card="---\ndatasets: [user/sums]\n---\n")
    adapter = hub.register("user/lora")
    assert (adapter.origin, adapter.sample_count) == ("card", 20)
    assert set(hub.samples("user/lora")) <= {row["inputs"] for row in rows}


def test_a_strangers_card_does_not_draw_on_the_callers_private_data(
    open_hub: Callable[..., LoraHub], server: LocalHub, publish: Callable[..., str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"inputs": "The salary of Mrs Dubois"}')
    server.publish_dataset("ann/private", data, private=True)
    card = "---\ndatasets: [ann/private]\n---\n# Lora\nIt does sums.\n"
    publish("mallory/lora", card=card)
    publish("ann/lora", seed=1, card=card)
    hub = open_hub(endpoint=server.url, token=TOKEN)
    assert hub.register("mallory/lora").origin == "guess"
    assert hub.register("ann/lora").origin == "card"
    assert hub.samples("ann/lora") == ("The salary of Mrs Dubois",)


def test_without_anything_the_vector_is_guessed_and_every_hit_says_so(
    hub: LoraHub, publish: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    publish("user/french", seed=1)
    publish("user/maths", seed=2)
    hub.register("user/french", samples=FRENCH)
    hub.register("user/maths", samples=MATHS)
    publish("user/lora", seed=3, card="# A lora\nIt translates English sentences into French.\n")
    adapter = hub.register("user/lora")
    assert (adapter.origin, adapter.sample_count) == ("guess", 0)
    assert "low trust" in caplog.text
    hits = {hit.adapter.name: hit for hit in hub.search("Translate into French: hello")}
    assert hits["user/lora"].trust == "low"
    assert hits["user/french"].trust == "high"
    assert hits["user/lora"].score > hits["user/maths"].score
    assert [hit.adapter.name for hit in hub.search("x", min_trust="medium", k=9)] != []
    assert "user/lora" not in {hit.adapter.name for hit in hub.search("x", min_trust="medium", k=9)}


def test_a_guess_never_looks_into_another_namespace(hub: LoraHub, publish: Callable[..., str]) -> None:
    publish("user/secret", seed=1)
    publish("user/lora", seed=1, card="# Lora\nIt adds numbers.\n")
    for namespace in ("before", "after", "theirs"):
        hub.register("user/lora", namespace=namespace)
        hub.register("user/secret", samples=FRENCH, namespace="theirs")
    before, after = (hub.search(MATHS[0], namespace=namespace)[0] for namespace in ("before", "after"))
    theirs = next(hit for hit in hub.search(MATHS[0], namespace="theirs") if hit.adapter.name == "user/lora")
    assert (before.trust, after.trust, theirs.trust) == ("low", "low", "low")
    assert before.score == pytest.approx(after.score, abs=1e-6)
    assert theirs.score != pytest.approx(after.score, abs=1e-3)


def test_texts_can_be_dropped_and_redacted(
    hub: LoraHub, publish: Callable[..., str], tmp_path: Path, open_hub: Callable[..., LoraHub], server: LocalHub
) -> None:
    publish("user/lora")
    secret = ["Translate for Mrs Dubois: good morning", "Mrs Dubois asks: what is bread in French?"]
    adapter = hub.register("user/lora", samples=secret, redact=lambda text: text.replace("Mrs Dubois", "X"))
    assert hub.samples("user/lora")[0] == "Translate for X: good morning"
    dropped = hub.register("user/lora", name="dropped", samples=secret, keep_samples=False)
    assert (dropped.sample_count, hub.samples("dropped")) == (2, ())
    assert hub.register("user/lora", name="dropped", samples=secret, keep_samples=False) == dropped
    assert hub.search(secret[0], k=1)[0].adapter == dropped
    assert adapter.sample_count == 2
    hub.close()
    for file in tmp_path.glob("hub.db*"):
        assert not file.is_file() or b"Dubois" not in file.read_bytes()


def test_samples_come_from_a_file(hub: LoraHub, publish: Callable[..., str], tmp_path: Path) -> None:
    publish("user/lora")
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(json.dumps({"inputs": text, "targets": "?"}) for text in FRENCH))
    hub.register("user/lora", samples=file)
    assert hub.samples("user/lora") == tuple(FRENCH)


def test_a_vector_alone_is_enough_and_survives_an_update(hub: LoraHub, publish: Callable[..., str]) -> None:
    publish("user/lora", seed=1)
    vector = hub.encoder.encode(FRENCH).mean(axis=0)
    adapter = hub.register("user/lora", embedding=vector)
    assert (adapter.origin, hub.samples("user/lora")) == ("owner", ())
    publish("user/lora", seed=2)
    hub.update("user/lora")
    (hit,) = hub.search(FRENCH[0])
    assert hit.trust == "high"
    assert hit.score == pytest.approx(
        float(np.dot(vector / np.linalg.norm(vector), hub.encoder.encode(FRENCH)[0])), abs=1e-4
    )


# -- whose, how good, and who did it ----------------------------------------------------------------------------------


def test_a_namespace_is_all_that_its_caller_sees(hub: LoraHub, publish: Callable[..., str], base: Path) -> None:
    publish("user/lora", seed=1)
    publish("user/other", seed=2)
    mine = hub.register("user/lora", samples=FRENCH, namespace="mine")
    theirs = hub.register("user/lora", samples=FRENCH, namespace="theirs")
    hub.register("user/other", samples=FRENCH, namespace="theirs")
    assert hub.namespaces() == ["mine", "theirs"]
    assert [hit.adapter for hit in hub.search(FRENCH[0], k=9, namespace="mine")] == [mine]
    assert hub.search(FRENCH[0]) == []
    (route,) = hub.route([FRENCH[0]], base_model=base, routing=Routing(namespace="mine"))
    assert [member.adapter for member in route.members] == [mine]
    with pytest.raises(errors.AdapterNotFoundError):
        hub.route([FRENCH[0]], base_model=base, routing=Routing(namespace="mine", adapters=("user/other",)))
    hub.remove("user/lora", namespace="mine")
    assert hub.get("user/lora", namespace="theirs") == theirs
    for namespace in ("", " mine", "a\nb", "x" * 129):
        with pytest.raises(errors.ConfigurationError, match="namespace"):
            hub.register("user/lora", samples=FRENCH, namespace=namespace)


def test_scores_are_shown_and_filter_searches_and_routes(hub: LoraHub, publish: Callable[..., str], base: Path) -> None:
    for seed, name in enumerate(("user/good", "user/bad")):
        publish(name, seed=seed)
        hub.register(name, samples=FRENCH)
    hub.record_score("user/good", "wmt14_enfr", "bleu", 31.5)
    hub.record_score("user/bad", "wmt14_enfr", "bleu", 4)
    (score,) = hub.scores("user/good")
    assert (score.task, score.metric, score.value, score.current) == ("wmt14_enfr", "bleu", 31.5, True)
    wanted = (MinScore("wmt14_enfr", "bleu", 20),)
    assert [hit.adapter.name for hit in hub.search(FRENCH[0], scores=wanted)] == ["user/good"]
    (route,) = hub.route([FRENCH[0]], base_model=base, routing=Routing(scores=wanted))
    assert [member.adapter.name for member in route.members] == ["user/good"]
    assert [(event.actor, event.action) for event in hub.events(limit=2)] == [("ann", "scored")] * 2


def test_inspection_reports_what_registering_would_do_and_registers_nothing(
    hub: LoraHub, server: LocalHub, publish: Callable[..., str], base: Path, tmp_path: Path
) -> None:
    sha = publish("user/lora", card="---\nlicense: mit\n---\n")
    report = hub.inspect("user/lora")
    assert (report.accepted, report.error) == (True, None)
    assert (report.revision, report.base_model) == (sha, str(base))
    folder = tiny_adapter(tmp_path / "bad", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    server.publish("user/dora", folder)
    refused = hub.inspect("user/dora")
    assert not refused.accepted
    assert "use_dora" in str(refused.message)
    with pytest.raises(errors.UnsupportedFeatureError, match="use_dora"):
        hub.register("user/dora", samples=FRENCH)
    assert hub.list() == []


def test_limits_are_the_callers(
    open_hub: Callable[..., LoraHub], server: LocalHub, publish: Callable[..., str]
) -> None:
    publish("user/lora")
    strict = open_hub(endpoint=server.url, limits=Limits(max_rank=2))
    with pytest.raises(errors.AdmissionError, match="rank"):
        strict.register("user/lora", samples=FRENCH)
    assert not strict.inspect("user/lora").accepted


def test_discovery_lists_adapters_of_a_base_and_registers_none(
    open_hub: Callable[..., LoraHub], server: LocalHub, base: Path, tmp_path: Path
) -> None:
    name = "somebody/tiny-llama"
    hub = open_hub(endpoint=server.url, base_folders={name: base})
    for seed, repo in enumerate(("ann/lora-fr", "bob/lora-sum")):
        folder = tiny_adapter(tmp_path / repo, base, seed=seed, base_name=name)
        (folder / "README.md").write_text(f"---\nbase_model: {name}\nlibrary_name: peft\ntags: [lora]\n---\n")
        server.publish(repo, folder)
    assert sorted(found.repo_id for found in hub.discover(name)) == ["ann/lora-fr", "bob/lora-sum"]
    (french,) = hub.discover(name, "fr")
    assert hub.list() == []
    assert hub.register(french.repo_id, revision=french.revision, samples=FRENCH).base_model == name


def test_arguments_that_make_no_sense_are_refused(hub: LoraHub, publish: Callable[..., str]) -> None:
    publish("user/lora")
    hub.register("user/lora", samples=FRENCH)
    for call in (
        lambda: hub.search("x", tags="french"),
        lambda: hub.search("x", licenses="mit"),
        lambda: hub.search("x", exclude="user/lora"),
        lambda: hub.search("x", min_trust="sure"),  # type: ignore[arg-type]
        lambda: hub.register("user/lora", name="other", samples=FRENCH, tags="french"),
        lambda: hub.register("user/lora", name=" other", samples=FRENCH),
        lambda: hub.update("user/lora", samples=FRENCH, embedding=[1.0]),
        lambda: hub.events(limit=0),
        lambda: hub.discover("some/base", limit=0),
    ):
        with pytest.raises(errors.ConfigurationError):
            call()
    assert len(hub.list()) == 1


def test_offline_finds_no_adapters_on_the_hub(open_hub: Callable[..., LoraHub], server: LocalHub) -> None:
    before = len(server.requests)
    with pytest.raises(errors.SourceError, match="offline"):
        open_hub(endpoint=server.url, offline=True).discover("some/base")
    assert len(server.requests) == before
