"""LoraHub through a loopback Hub with the real client: from a repository to an answer, and every way it can fail."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_hub_sdk import errors
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import LocalHub, tiny_adapter, tiny_base
from lora_hub_sdk.types import Routing, Sampling

FRENCH = ["Translate into French: good morning", "How do you say 'thank you' in French?"]
MATHS = ["What is 12 + 30?", "Add 4 and 9."]
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub(token="hf_secret_token") as started:
        yield started


@pytest.fixture
def pool(hub: LoraHub, base: Path, tmp_path: Path) -> LoraHub:
    """A hub with an adapter for French and one for sums."""
    for seed, (name, samples) in enumerate({"french": FRENCH, "maths": MATHS}.items()):
        hub.register(tiny_adapter(tmp_path / name, base, seed=seed), samples=samples)
    return hub


# -- registering ----------------------------------------------------------------------------------------------------


def test_an_adapter_is_pulled_pinned_and_found(
    open_hub: Callable[..., LoraHub], server: LocalHub, base: Path, tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", base, rank=4, alpha=8.0)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [french]\n---\n# French\n")
    sha = server.publish("user/lora-french", folder)
    hub = open_hub(endpoint=server.url)
    adapter = hub.register("user/lora-french", samples=FRENCH, tags=["short"])
    assert (adapter.name, adapter.repo_id, adapter.revision) == ("user/lora-french", "user/lora-french", sha)
    assert (adapter.rank, adapter.alpha, adapter.license, adapter.sample_count) == (4, 8.0, "mit", 2)
    assert {"french", "short"} <= set(adapter.tags)
    assert hub.get("user/lora-french") == adapter
    assert hub.list() == [adapter]
    (hit,) = hub.search("Say 'good evening' in French")
    assert hit.adapter == adapter
    assert 0.3 < hit.score <= 1.0
    assert hub.samples("user/lora-french") == tuple(FRENCH)


def test_registering_again_changes_nothing(
    open_hub: Callable[..., LoraHub], server: LocalHub, base: Path, tmp_path: Path
) -> None:
    server.publish("user/lora", tiny_adapter(tmp_path / "lora", base))
    hub = open_hub(endpoint=server.url)
    first = hub.register("user/lora", samples=FRENCH)
    digest = hub.digest
    assert hub.register("user/lora", samples=FRENCH) == first
    assert hub.register("user/lora") == first
    assert hub.register("user/lora", revision=first.revision, samples=[{"inputs": text} for text in FRENCH]) == first
    assert hub.digest == digest


def test_a_moved_branch_is_not_taken_for_the_same(
    open_hub: Callable[..., LoraHub], server: LocalHub, base: Path, tmp_path: Path
) -> None:
    old = server.publish("user/lora", tiny_adapter(tmp_path / "one", base, seed=1))
    hub = open_hub(endpoint=server.url)
    hub.register("user/lora", samples=FRENCH)
    server.publish("user/lora", tiny_adapter(tmp_path / "two", base, seed=2))
    for samples in (FRENCH, None):
        with pytest.raises(errors.NameTakenError, match="another name"):
            hub.register("user/lora", samples=samples)
    assert hub.get("user/lora").revision == old
    assert hub.register("user/lora", name="newer", samples=FRENCH).revision != old


def test_a_local_folder_is_pinned_by_its_content(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    adapter = hub.register(tiny_adapter(tmp_path / "mine", base), samples=FRENCH)
    assert adapter.name == "mine"
    assert len(adapter.revision) == 40
    assert adapter.digest.startswith(adapter.revision)


def test_an_owner_can_keep_the_samples_and_give_a_vector(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    vector = hub.encoder.encode(FRENCH).mean(axis=0) * 7
    adapter = hub.register(tiny_adapter(tmp_path / "mine", base), embedding=vector.tolist())
    assert adapter.sample_count == 0
    (hit,) = hub.search(FRENCH[0])
    expected = float(hub.encoder.encode(FRENCH[:1])[0] @ (vector / np.linalg.norm(vector)))
    assert hit.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("embedding", [[1.0, 2.0], [0.0] * 384, [float("nan")] * 384, "text", [[1.0] * 384]])
def test_vectors_that_cannot_be_searched_are_refused(hub: LoraHub, base: Path, tmp_path: Path, embedding: Any) -> None:
    with pytest.raises(errors.SamplesError):
        hub.register(tiny_adapter(tmp_path / "mine", base), embedding=embedding)
    assert hub.list() == []


def _break_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def _break_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**raw, **changes}))


def _only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


BAD_REPOSITORIES: dict[str, tuple[Callable[[Path], object], type[errors.LoraHubError]]] = {
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), errors.MissingConfigError),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), errors.MissingWeightsError),
    "pickle only": (_only_pickle, errors.UnsafeWeightsError),
    "other rank": (lambda folder: _break_config(folder, r=5), errors.ShapeMismatchError),
    "DoRA": (lambda folder: _break_config(folder, use_dora=True), errors.UnsupportedFeatureError),
    "no base": (lambda folder: _break_config(folder, base_model_name_or_path=None), errors.InvalidConfigError),
    "base that nobody has": (
        lambda folder: _break_config(folder, base_model_name_or_path="nobody/base"),
        errors.ModelNotFoundError,
    ),
    "unknown tensors": (
        lambda folder: _break_weights(folder, lambda tensors: tensors.update(x=torch.zeros(1))),
        errors.UnmatchedTensorsError,
    ),
    "NaN": (
        lambda folder: _break_weights(folder, lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(float("nan"))),
        errors.NonFiniteWeightsError,
    ),
    "truncated": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
        errors.DamagedWeightsError,
    ),
}


@pytest.mark.parametrize("case", BAD_REPOSITORIES)
def test_bad_repositories_are_refused_and_nothing_is_half_registered(
    open_hub: Callable[..., LoraHub], server: LocalHub, base: Path, tmp_path: Path, case: str
) -> None:
    spoil, error = BAD_REPOSITORIES[case]
    folder = tiny_adapter(tmp_path / "lora", base)
    spoil(folder)
    server.publish("user/bad", folder)
    hub = open_hub(endpoint=server.url)
    hub.register(tiny_adapter(tmp_path / "good", base), samples=MATHS)
    with pytest.raises(error):
        hub.register("user/bad", samples=FRENCH)
    assert [adapter.name for adapter in hub.list()] == ["good"]
    assert hub.verify().agrees


def test_unreachable_private_and_missing_repositories(
    open_hub: Callable[..., LoraHub], server: LocalHub, base: Path, tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", base)
    server.publish("user/gated", folder, gated=True)
    server.publish("user/private", folder, private=True)
    server.publish("user/open", folder)
    hub = open_hub(endpoint=server.url)
    for reference, error in {
        "user/none": errors.RepoNotFoundError,
        "user/gated": errors.RepoAccessError,
        "user/private": errors.RepoAccessError,
        str(tmp_path / "no-folder"): errors.RepoNotFoundError,
    }.items():
        with pytest.raises(error):
            hub.register(reference, samples=FRENCH)
    with pytest.raises(errors.RevisionNotFoundError):
        hub.register("user/open", revision="v9", samples=FRENCH)
    assert hub.list() == []
    trusted = open_hub(endpoint=server.url, token="hf_secret_token", database=tmp_path / "two.db")
    assert trusted.register("user/private", samples=FRENCH).repo_id == "user/private"


def test_the_base_that_was_asked_for_is_the_adapters_or_it_is_refused(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "lora", base)
    with pytest.raises(errors.BaseModelMismatchError, match="smollm2"):
        hub.register(folder, samples=FRENCH, base_model="other/smollm2")
    assert hub.register(folder, samples=FRENCH, base_model=base).base_model == str(base)


def test_a_path_from_the_trainers_machine_gives_way_to_the_base_that_is_named(
    hub: LoraHub, base: Path, tmp_path: Path
) -> None:
    folder = tiny_adapter(tmp_path / "lora", base, base_name="/home/somebody/models/llama")
    with pytest.raises(errors.ModelNotFoundError):
        hub.register(folder, samples=FRENCH)
    assert hub.register(folder, samples=FRENCH, base_model=base).base_model == str(base)


@pytest.mark.parametrize("samples", [[], ["", " "], "just one text"])
def test_samples_without_any_text_are_refused(hub: LoraHub, base: Path, tmp_path: Path, samples: Any) -> None:
    with pytest.raises(errors.SamplesError):
        hub.register(tiny_adapter(tmp_path / "lora", base), samples=samples)
    assert hub.list() == []


def test_samples_and_a_vector_at_once_are_refused(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="not both"):
        hub.register(tiny_adapter(tmp_path / "lora", base), samples=FRENCH, embedding=[0.1] * 384)


def test_threads_registering_the_same_end_with_one(hub: LoraHub, base: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "lora", base)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(hub.register(folder, samples=FRENCH))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [hub.get("lora")] * 4
    assert hub.verify().vectors == 1


def test_removing_forgets_and_the_name_is_free_again(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    pool.remove("french")
    assert [hit.adapter.name for hit in pool.search(FRENCH[0])] == ["maths"]
    with pytest.raises(errors.AdapterNotFoundError):
        pool.get("french")
    again = pool.register(tmp_path / "french", samples=MATHS)
    assert [hit.adapter for hit in pool.search(MATHS[0], k=2)] == [again, pool.get("maths")]  # a tie, so by name


# -- searching ------------------------------------------------------------------------------------------------------


def test_search_many_equals_one_by_one(pool: LoraHub) -> None:
    prompts = ["Bonjour means?", "7 + 8", "日本語", "a" * 20_000]
    together = pool.search_many(prompts, k=2)
    for prompt, hits in zip(prompts, together, strict=True):
        alone = pool.search(prompt, k=2)
        assert [hit.adapter for hit in hits] == [hit.adapter for hit in alone]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-5)
    assert pool.search_many([]) == []


def test_search_bounds(pool: LoraHub) -> None:
    assert len(pool.search("7 + 8", k=50)) == 2
    assert pool.search("7 + 8", namespace="nobody's") == []
    assert [hit.adapter.name for hit in pool.search("7 + 8", exclude=["maths"])] == ["french"]
    for k in (0, -1, 1.5, True):
        with pytest.raises(errors.ConfigurationError, match="k="):
            pool.search("7 + 8", k=k)  # type: ignore[arg-type]
    with pytest.raises(errors.EmptyPromptError) as caught:
        pool.search_many(["fine", " \n"])
    assert caught.value.row == 1


def test_an_empty_hub_finds_nothing(hub: LoraHub) -> None:
    assert hub.search("anything") == []


def test_another_encoder_asks_for_reindexing(pool: LoraHub, open_hub: Callable[..., LoraHub]) -> None:
    pool.close()
    plain = SentenceEncoder(resolve_model("all-minilm-l6-v2"), instruction="")
    other = open_hub(encoder=plain)
    with pytest.raises(errors.EncoderMismatchError, match="reindex"):
        other.search("7 + 8")
    assert other.reindex() == 2
    assert other.search("7 + 8", k=1)[0].adapter.name == "maths"
    assert other.verify().agrees


# -- routing and answering ------------------------------------------------------------------------------------------


def test_each_prompt_gets_its_own_adapters_in_one_batch(pool: LoraHub, base: Path) -> None:
    completions = pool.generate(
        ["Say yes in French", "Add 3 and 4"], base_model=base, routing=Routing("selection"), sampling=Sampling(4)
    )
    names = [completion.trace.route.members[0].adapter.name for completion in completions]
    assert names == ["french", "maths"]
    assert [completion.trace.batch_size for completion in completions] == [2, 2]
    assert pool.engine(base).batches == 1


def test_one_engine_for_one_base_and_settings(pool: LoraHub, base: Path) -> None:
    assert pool.engine(base) is pool.engine(str(base))


def test_an_empty_registry_is_no_excuse_for_the_base_model(hub: LoraHub, base: Path) -> None:
    with pytest.raises(errors.NoAdaptersError, match="register some"):
        hub.generate(["x"], base_model=base)
    (completion,) = hub.generate(["x"], base_model=base, routing=Routing("base"), sampling=Sampling(2))
    assert completion.trace.route.as_dict()["adapters"] == []


def test_adapters_of_another_base_are_never_used(pool: LoraHub, tmp_path: Path) -> None:
    other = tiny_base(tmp_path / "other-base", seed=5)
    with pytest.raises(errors.NoAdaptersError, match="holds 2 adapters"):
        pool.generate(["x"], base_model=other)
    with pytest.raises(errors.ConfigurationError, match="is for base"):
        pool.generate(["x"], base_model=other, routing=Routing("selection", adapters=("maths",)))


def test_a_folder_serves_the_adapters_of_the_model_that_it_was_said_to_be(
    open_hub: Callable[..., LoraHub], base: Path, tmp_path: Path
) -> None:
    hub = open_hub(base_folders={"meta/tiny": base})
    adapter = hub.register(tiny_adapter(tmp_path / "lora", base, base_name="meta/tiny"), samples=MATHS)
    assert adapter.base_model == "meta/tiny"
    assert hub.register(tmp_path / "lora", base_model=base) == adapter
    for name in (base, "meta/tiny"):
        (completion,) = hub.generate(["1 + 1"], base_model=name, sampling=Sampling(2))
        assert completion.trace.route.members[0].adapter == adapter
    assert hub.engine(base) is hub.engine("meta/tiny")
    hub.close()
    with pytest.raises(errors.NoAdaptersError, match="base_folders"):
        open_hub().generate(["1 + 1"], base_model=base)


def test_min_score_leaves_a_prompt_to_the_base_model(pool: LoraHub, base: Path) -> None:
    prompts = [FRENCH[0], "zebra crossing"]
    near, far = (hits[0].score for hits in pool.search_many(prompts, k=1))
    routes = pool.route(prompts, base_model=base, routing=Routing("selection", min_score=(near + far) / 2))
    assert [len(route.members) for route in routes] == [1, 0]


def test_pinned_adapters_skip_the_search(pool: LoraHub, base: Path) -> None:
    (route,) = pool.route([FRENCH[0]], base_model=base, routing=Routing("fusion", adapters=("maths", "french")))
    assert [(member.adapter.name, member.weight, member.score) for member in route.members] == [
        ("maths", 0.5, None),
        ("french", 0.5, None),
    ]
    with pytest.raises(errors.AdapterNotFoundError):
        pool.route(["x"], base_model=base, routing=Routing(adapters=("nobody",)))


@pytest.mark.parametrize("routing", [Routing("soup"), Routing(k=0), Routing(weights="odd"), Routing(adapters=())])
def test_routing_that_makes_no_sense_is_refused(pool: LoraHub, base: Path, routing: Routing) -> None:
    with pytest.raises(errors.ConfigurationError):
        pool.generate(["x"], base_model=base, routing=routing)


@pytest.mark.parametrize("routing", [Routing("base"), Routing("selection"), Routing("selection", adapters=("maths",))])
def test_an_empty_prompt_is_refused_by_every_strategy(pool: LoraHub, base: Path, routing: Routing) -> None:
    with pytest.raises(errors.EmptyPromptError):
        pool.generate(["fine", ""], base_model=base, routing=routing)


def test_registering_again_finds_the_files_at_their_new_place(pool: LoraHub, base: Path, tmp_path: Path) -> None:
    before = pool.get("maths")
    shutil.move(tmp_path / "maths", tmp_path / "moved")
    after = pool.register(tmp_path / "moved", name="maths")
    assert (after.id, after.digest, after.folder) == (before.id, before.digest, tmp_path / "moved")
    assert pool.get("maths") == after
    assert pool.generate(["1 + 1"], base_model=base, routing=Routing("selection"), sampling=Sampling(2))


def test_one_text_in_place_of_a_list_is_refused(pool: LoraHub, base: Path) -> None:
    for ask in (pool.search_many, lambda text: pool.generate(text, base_model=base)):
        with pytest.raises(errors.ConfigurationError, match="list of"):
            ask("one text")


def test_an_adapter_whose_files_are_gone_is_an_error_not_the_base_model(
    pool: LoraHub, base: Path, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "maths")
    with pytest.raises(errors.AdapterChangedError, match="maths"):
        pool.generate(["1 + 1"], base_model=base, routing=Routing("selection"))


def test_a_base_model_that_nobody_has(pool: LoraHub) -> None:
    with pytest.raises(errors.ModelNotFoundError, match="nobody/model"):
        pool.engine("nobody/model")


def test_a_closed_hub_says_so(pool: LoraHub, base: Path) -> None:
    with pool:
        pass
    pool.close()
    with pytest.raises(errors.EngineClosedError):
        pool.engine(base)


def test_everything_is_there_after_reopening(pool: LoraHub, open_hub: Callable[..., LoraHub]) -> None:
    before = pool.list()
    pool.close()
    again = open_hub()
    assert again.list() == before
    assert again.search("Add 3 and 4", k=1)[0].adapter.name == "maths"
