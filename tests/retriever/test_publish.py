"""A trained retriever goes to a Hub and comes back by its name, the same one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from typer.testing import CliRunner

from lora_hub_sdk.cli import app
from lora_hub_sdk.errors import ConfigurationError, DownloadError, ModelDamagedError, RepoAccessError
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.retriever.publish import push_retriever
from lora_hub_sdk.retriever.settings import read_settings
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.retriever.trainer import RetrieverTrainer
from lora_hub_sdk.testing import LocalHub, tiny_encoder

REPO = "ann/retriever"
TOKEN = "hf_secret_of_ann"
TASKS = [Task(name, tuple(f"{name} {word}" for word in ("oak", "lamp", "bread")), "d") for name in ("sum", "mood")]


def train(start: Path, output: Path, seed: int = 0) -> Path:
    trainer = RetrieverTrainer(
        encoder=start, steps=2, check_every=2, seed=seed, device="cpu", instruction="Which task: ", offline=True
    )
    return trainer.fit_tasks(TASKS, output_dir=output).folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def trained(tiny: Path) -> Path:
    return train(tiny, tiny.parent / "trained")


@pytest.fixture
def server() -> Iterator[LocalHub]:
    with LocalHub(token=TOKEN) as server:
        yield server


@pytest.fixture(autouse=True)
def no_token_and_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the developer's own token nor what was downloaded before."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


def files(server: LocalHub, repo_id: str = REPO) -> set[str]:
    return {*HfApi(endpoint=server.url, token=TOKEN).list_repo_files(repo_id)} - {".gitattributes"}


def fingerprint(folder: Path) -> str:
    return SentenceEncoder(resolve_model(folder)).fingerprint


def commits(server: LocalHub) -> int:
    return len([path for method, path in server.requests if method == "POST" and "/commit/" in path])


def test_a_pushed_retriever_is_used_by_its_name(server: LocalHub, trained: Path, tmp_path: Path) -> None:
    commit = push_retriever(trained, REPO, endpoint=server.url, token=TOKEN)
    assert HfApi(endpoint=server.url, token=False).model_info(REPO).sha == commit
    assert (len(commit), commits(server)) == (40, 1)

    found = resolve_model(REPO, endpoint=server.url)
    assert (found.source, found.folder.name) == ("hub", commit)
    assert SentenceEncoder(found).fingerprint == fingerprint(trained)
    assert read_settings(found.folder) == read_settings(trained)
    assert (read_settings(found.folder).instruction, read_settings(found.folder).rerank) == ("Which task: ", True)
    with (
        LoraHub(tmp_path / "one.db", encoder=REPO, endpoint=server.url, cache_dir=tmp_path / "cache") as by_name,
        LoraHub(tmp_path / "two.db", encoder=trained) as by_folder,
    ):
        texts = ["sum oak", "something else", ""]
        np.testing.assert_array_equal(by_name.encoder.encode(texts), by_folder.encoder.encode(texts))


def test_plain_sentence_transformers_loads_it_by_name_and_the_card_is_read(
    server: LocalHub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    push_retriever(trained, REPO, endpoint=server.url, token=TOKEN)
    # What HF_ENDPOINT does when it is set before the import.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    vectors = SentenceTransformer(REPO, device="cpu").encode(["sum oak"], prompt_name="task")
    expected = SentenceEncoder(resolve_model(trained), device="cpu").encode(["sum oak"])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert ModelCard.load(REPO).data.library_name == "sentence-transformers"


def test_the_same_folder_makes_no_second_commit(server: LocalHub, trained: Path) -> None:
    first = push_retriever(trained, REPO, endpoint=server.url, token=TOKEN)
    assert push_retriever(trained, REPO, endpoint=server.url, token=TOKEN) == first
    assert commits(server) == 1


def test_another_training_takes_the_place_of_the_first(
    server: LocalHub, tiny: Path, trained: Path, tmp_path: Path
) -> None:
    sharded = shutil.copytree(trained, tmp_path / "sharded")
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    first = push_retriever(sharded, REPO, endpoint=server.url, token=TOKEN)
    other = train(tiny, tmp_path / "other", seed=1)
    second = push_retriever(other, REPO, endpoint=server.url, token=TOKEN)
    assert second != first
    # Both weights together would be a third encoder.
    found = SentenceEncoder(resolve_model(REPO, endpoint=server.url))
    assert found.fingerprint == fingerprint(other) != fingerprint(trained)
    old = HfApi(endpoint=server.url, token=False).list_repo_files(REPO, revision=first)
    assert "model-00001-of-00001.safetensors" in old


def test_only_what_the_model_needs_is_pushed(server: LocalHub, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    expected = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    for private in (".secret.json", "samples.jsonl", "checkpoints/checkpoint-2/config.json", ".git/x.json", "run.log"):
        (folder / private).parent.mkdir(parents=True, exist_ok=True)
        (folder / private).write_text("{}")
    push_retriever(folder, REPO, endpoint=server.url, token=TOKEN)
    assert files(server) == expected
    assert {"training.json", "lora_hub_retriever.json", "README.md", "1_Pooling/config.json"} <= expected


def test_a_private_retriever_opens_with_the_token_alone(server: LocalHub, trained: Path) -> None:
    push_retriever(trained, REPO, endpoint=server.url, token=TOKEN, private=True)
    assert HfApi(endpoint=server.url, token=TOKEN).model_info(REPO).private
    assert resolve_model(REPO, endpoint=server.url, token=TOKEN).source == "hub"


def test_what_was_meant_to_be_private_never_goes_to_a_public_repository(server: LocalHub, trained: Path) -> None:
    HfApi(endpoint=server.url, token=TOKEN).create_repo(REPO)
    with pytest.raises(ConfigurationError, match="there already and public"):
        push_retriever(trained, REPO, endpoint=server.url, token=TOKEN, private=True)
    assert files(server) == set()


def test_another_model_is_not_overwritten(server: LocalHub, trained: Path, base: Path) -> None:
    server.publish("ann/base", base)
    before = files(server, "ann/base")
    with pytest.raises(ConfigurationError, match="holds another model"):
        push_retriever(trained, "ann/base", endpoint=server.url, token=TOKEN)
    assert files(server, "ann/base") == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_without_the_right_to_write_nothing_is_pushed(
    server: LocalHub, trained: Path, token: str | None, there: bool
) -> None:
    if there:
        HfApi(endpoint=server.url, token=TOKEN).create_repo(REPO)
    with pytest.raises(RepoAccessError, match="a token that may write") as caught:
        push_retriever(trained, REPO, endpoint=server.url, token=token)
    assert "somebody" not in str(caught.value)
    assert commits(server) == 0


def test_a_token_that_may_only_read_is_refused(server: LocalHub, trained: Path) -> None:
    server.fail(REPO, status=403)
    with pytest.raises(RepoAccessError, match="a token that may write"):
        push_retriever(trained, REPO, endpoint=server.url, token=TOKEN)


def test_a_hub_that_is_away_or_ill_is_told(server: LocalHub, trained: Path) -> None:
    server.fail(REPO, status=500)
    with pytest.raises(DownloadError, match="could not be pushed to"):
        push_retriever(trained, REPO, endpoint=server.url, token=TOKEN)
    server.close()
    with pytest.raises(DownloadError, match="check the connection"):
        push_retriever(trained, REPO, endpoint="http://127.0.0.1:9", token=TOKEN)


@pytest.mark.parametrize("repo_id", ["", "retriever", "a/b/c", "../up", "ann/a--b", "ann/", "https://x/ann/r"])
def test_a_bad_name_is_refused_before_anything_is_asked(server: LocalHub, trained: Path, repo_id: str) -> None:
    with pytest.raises(ConfigurationError, match="repository"):
        push_retriever(trained, repo_id, endpoint=server.url, token=TOKEN)
    assert server.requests == []


@pytest.mark.parametrize("lacking", ["training.json", "lora_hub_retriever.json", "README.md", "modules.json"])
def test_an_unfinished_folder_names_what_it_lacks(
    server: LocalHub, trained: Path, tmp_path: Path, lacking: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / lacking).unlink()
    with pytest.raises(ConfigurationError, match=lacking):
        push_retriever(folder, REPO, endpoint=server.url, token=TOKEN)
    assert server.requests == []


def test_damaged_folders_are_refused(server: LocalHub, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    settings = json.loads((folder / "lora_hub_retriever.json").read_text())
    (folder / "lora_hub_retriever.json").write_text(json.dumps({**settings, "min_score": 7}))
    with pytest.raises(ConfigurationError, match="min_score"):
        push_retriever(folder, REPO, endpoint=server.url, token=TOKEN)
    os.remove(folder / "model.safetensors")
    with pytest.raises(ModelDamagedError, match=r"model\.safetensors"):
        push_retriever(folder, REPO, endpoint=server.url, token=TOKEN)
    with pytest.raises(ConfigurationError, match="no folder of a finished training"):
        push_retriever(tmp_path / "nowhere", REPO, endpoint=server.url, token=TOKEN)
    assert server.requests == []


# -- from the command line -----------------------------------------------------------------------------------


def test_the_command_pushes_and_prints_the_commit(
    server: LocalHub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["push-retriever", str(trained), REPO, "--private", "--endpoint", server.url, "--json"]
    refused = CliRunner().invoke(app, command)
    assert (refused.exit_code, json.loads(refused.stdout)["error"]["type"]) == (1, "RepoAccessError")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = HfApi(endpoint=server.url).model_info(REPO)
    assert json.loads(done.stdout) == {"repo_id": REPO, "commit": found.sha}
    assert found.private


def test_a_training_may_end_on_the_hub(
    server: LocalHub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"task": t.name, "domain": "d", "inputs": i}) + "\n" for t in TASKS for i in t.inputs)
    )
    command = ["train-retriever", str(tmp_path / "out"), "--tasks", str(rows), "--encoder", str(tiny), "--steps", "2"]
    command += ["--device", "cpu", "--endpoint", server.url, "--json"]
    # Told before the training, not after it.
    for wrong in (["--push", "nobody"], ["--push", REPO, "--offline"]):
        assert CliRunner().invoke(app, [*command, *wrong]).exit_code != 0
        assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*command, "--push", REPO])
    assert done.exit_code == 0, done.output
    commit = HfApi(endpoint=server.url).model_info(REPO).sha
    assert json.loads(done.stdout)["pushed"] == {"repo_id": REPO, "commit": commit}
