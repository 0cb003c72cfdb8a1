"""The local Hub as the real clients see it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.testing import LocalHub

REPO = "ann/lora-sst2"
WEIGHTS = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
WEIGHTS = len(WEIGHTS).to_bytes(8, "little") + WEIGHTS + bytes(8)
CARD = "---\nlicense: mit\nlibrary_name: peft\nbase_model: base/small\ntags: [lora, sst2]\n---\n# An adapter\n"


def fill(folder: Path, **changes: bytes) -> Path:
    (folder / "notes").mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (folder / "adapter_model.safetensors").write_bytes(changes.get("weights", WEIGHTS))
    (folder / "README.md").write_text(CARD)
    (folder / "notes" / "log.txt").write_text("0123456789")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    fill(tmp_path / "repos" / "ann" / "lora-sst2")
    with LocalHub(tmp_path / "repos", token="hf_secret") as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


def resolve(hub: LocalHub, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{hub.url}/{REPO}/resolve/main/{path}", headers=headers)


def test_snapshot_has_every_byte(hub: LocalHub, tmp_path: Path) -> None:
    folder = Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "cache"))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "README.md": CARD.encode(),
        "adapter_config.json": b'{"peft_type": "LORA", "r": 2}',
        "adapter_model.safetensors": WEIGHTS,
        "notes/log.txt": b"0123456789",
    }


def test_info_tree_and_listing(api: HfApi) -> None:
    info = api.model_info(REPO, files_metadata=True)
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert {file.rfilename: file.size for file in info.siblings or ()}["notes/log.txt"] == 10
    assert {"lora", "sst2", "license:mit", "base_model:base/small", "base_model:adapter:base/small"} <= set(
        info.tags or ()
    )
    top = [entry.path for entry in api.list_repo_tree(REPO)]
    assert sorted(top) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "notes"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "notes")] == ["notes/log.txt"]
    assert "notes/log.txt" in api.list_repo_files(REPO, revision=info.sha)
    assert [entry.path for entry in api.get_paths_info(REPO, ["README.md", "none"])] == ["README.md"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))


def test_etags_are_the_digests_that_git_and_lfs_use(api: HfApi, hub: LocalHub) -> None:
    files = {file.rfilename: file for file in api.model_info(REPO, files_metadata=True).siblings or ()}
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    lfs = files["adapter_model.safetensors"].lfs
    assert lfs is not None
    assert lfs.sha256 == sha256
    assert resolve(hub, "adapter_model.safetensors").headers["ETag"] == f'"{sha256}"'
    blob = hashlib.sha1(b"blob 10\x000123456789").hexdigest()
    assert resolve(hub, "notes/log.txt").headers["ETag"] == f'"{blob}"'
    assert files["notes/log.txt"].blob_id == blob


@pytest.mark.parametrize(
    ("wanted", "body", "content_range"),
    [
        ("bytes=2-4", "234", "bytes 2-4/10"),
        ("bytes=7-", "789", "bytes 7-9/10"),
        ("bytes=-2", "89", "bytes 8-9/10"),
        ("bytes=8-99", "89", "bytes 8-9/10"),
    ],
)
def test_ranges(hub: LocalHub, wanted: str, body: str, content_range: str) -> None:
    answer = resolve(hub, "notes/log.txt", Range=wanted)
    assert (answer.status_code, answer.text) == (206, body)
    assert answer.headers["Content-Range"] == content_range


def test_a_range_behind_the_end_is_refused(hub: LocalHub) -> None:
    assert resolve(hub, "notes/log.txt", Range="bytes=10-").status_code == 416


def test_safetensors_header_is_read_by_range(api: HfApi) -> None:
    header = api.parse_safetensors_file_metadata(REPO, "adapter_model.safetensors")
    assert header.tensors["a"].shape == [2]


def test_listing_filters(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    hub.publish("bob/base", plain)
    hub.publish("bob/secret", plain, private=True)

    def ids(**options: object) -> list[str]:
        return [info.id for info in api.list_models(**options)]

    assert ids() == [REPO, "bob/base"]
    assert ids(filter=["lora", "base_model:adapter:base/small"]) == [REPO]
    assert ids(filter="base_model:adapter:another") == []
    assert ids(author="bob") == ["bob/base"]
    assert ids(search="SST") == [REPO]
    assert ids(limit=1) == [REPO]
    assert ids(author="bob", token=hub.token) == ["bob/base", "bob/secret"]


def test_a_revision_stays_when_its_branch_moves(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    first = api.model_info(REPO).sha
    second = hub.publish(REPO, fill(tmp_path / "repos" / "ann" / "lora-sst2", weights=b"second"))
    assert len(second) == 40
    assert api.model_info(REPO).sha == second != first

    def weights(revision: str | None) -> bytes:
        url, cache = hub.url, tmp_path / "cache"
        file = hf_hub_download(REPO, "adapter_model.safetensors", revision=revision, endpoint=url, cache_dir=cache)
        return Path(file).read_bytes()

    assert weights(None) == b"second"
    assert weights(first) == WEIGHTS
    assert api.model_info(REPO, revision=second[:8]).sha == second


def test_branches_with_a_slash(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    other = hub.publish(REPO, fill(tmp_path / "other", weights=b"other"), branch="refs/pr/1")
    assert api.model_info(REPO, revision="refs/pr/1").sha == other != api.model_info(REPO).sha


def test_a_commit_depends_on_content_and_parent_only(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder")
    with LocalHub() as one, LocalHub() as other:
        history = [one.publish(REPO, folder), one.publish(REPO, folder)]
        assert [other.publish(REPO, folder), other.publish(REPO, folder)] == history
    assert len(set(history)) == 2


def test_links_that_leave_the_folder_are_not_published(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("private")
    folder = fill(tmp_path / "linked")
    (folder / "leak.txt").symlink_to(tmp_path / "private.txt")
    (folder / "leak").symlink_to(tmp_path)
    hub.publish("ann/linked", folder)
    assert not [name for name in api.list_repo_files("ann/linked") if "leak" in name]


@pytest.mark.parametrize("path", ["../../private.txt", "..%2f..%2fprivate.txt", "/etc/passwd", "%2fetc%2fpasswd"])
def test_no_request_reaches_the_disk(hub: LocalHub, path: str) -> None:
    connection = httpx.Client()
    raw = httpx.URL(hub.url).copy_with(raw_path=f"/{REPO}/resolve/main/{path}".encode())
    assert connection.get(raw).status_code == 404


def test_missing_things(api: HfApi, hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ann/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="nowhere")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "none.bin", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert not api.file_exists(REPO, "none.bin")
    assert api.file_exists(REPO, "README.md")
    assert httpx.get(f"{hub.url}/api/datasets/ann/data").status_code == 404


def test_private_repositories_hide(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    hub.publish("ann/private", fill(tmp_path / "private"), private=True)
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.model_info("ann/private")
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("ann/private", token="hf_wrong")
    assert api.model_info("ann/private", token=hub.token).private


def test_gated_repositories_show_their_listing_but_no_file(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    hub.publish("ann/gated", fill(tmp_path / "gated"), gated=True)
    assert api.model_info("ann/gated").gated == "manual"
    for token in (False, "hf_wrong"):
        with pytest.raises(GatedRepoError):
            hf_hub_download("ann/gated", "README.md", endpoint=hub.url, token=token, cache_dir=tmp_path / "cache")
    file = hf_hub_download("ann/gated", "README.md", endpoint=hub.url, token=hub.token, cache_dir=tmp_path / "cache")
    assert Path(file).read_text() == CARD


def test_fail_counts_and_heals(hub: LocalHub) -> None:
    hub.fail(REPO, status=503, times=2)
    assert [resolve(hub, "README.md").status_code for _ in range(3)] == [503, 503, 200]
    hub.fail(REPO, status=429, path="README.md")
    assert resolve(hub, "README.md").status_code == 429
    assert resolve(hub, "notes/log.txt").status_code == 200
    hub.heal()
    assert resolve(hub, "README.md").status_code == 200


def test_truncate_promises_more_than_it_sends(hub: LocalHub) -> None:
    hub.truncate(REPO, "notes/log.txt", keep=4, times=2)
    with pytest.raises(httpx.RemoteProtocolError, match="received 4 bytes, expected 10"):
        resolve(hub, "notes/log.txt")
    with pytest.raises(httpx.RemoteProtocolError, match="received 0 bytes, expected 6"):
        resolve(hub, "notes/log.txt", Range="bytes=4-")
    assert resolve(hub, "notes/log.txt").text == "0123456789"


def test_delay(hub: LocalHub) -> None:
    hub.delay(0.2)
    started = time.monotonic()
    resolve(hub, "README.md")
    assert time.monotonic() - started >= 0.2


def test_requests_are_kept_in_order(hub: LocalHub) -> None:
    resolve(hub, "README.md")
    httpx.head(f"{hub.url}/api/models/{REPO}?blobs=true")
    assert hub.requests == [("GET", f"/{REPO}/resolve/main/README.md"), ("HEAD", f"/api/models/{REPO}")]


def test_a_closed_hub_does_not_answer_on_open_connections(tmp_path: Path) -> None:
    hub = LocalHub().start()
    url = hub.url
    with httpx.Client() as client:
        assert client.get(f"{url}/api/models").json() == []
        hub.close()
        hub.close()
        with pytest.raises(httpx.TransportError):
            client.get(f"{url}/api/models")
    with pytest.raises(ConfigurationError):
        _ = hub.url


def test_publishing_while_serving(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    folder, errors = fill(tmp_path / "folder"), list[Exception]()

    def read() -> None:
        try:
            for _ in range(20):
                assert api.model_info(REPO).sha
                assert list(api.list_models())
        except Exception as error:
            errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(20):
        hub.publish(REPO, folder)
        hub.publish(f"ann/more-{number}", folder)
    for reader in readers:
        reader.join()
    assert not errors


@pytest.mark.parametrize("repo_id", ["", "../up", "a/b/c", ".hidden/x", "a/../b"])
def test_publish_refuses_what_is_no_id(tmp_path: Path, repo_id: str) -> None:
    with LocalHub() as hub, pytest.raises(ConfigurationError):
        hub.publish(repo_id, tmp_path)


def test_publish_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with LocalHub() as hub, pytest.raises(ConfigurationError):
        hub.publish(REPO, tmp_path / "nothing")
    with pytest.raises(ConfigurationError):
        LocalHub(tmp_path / "nothing").start()


def point_clients_to(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does when it is set before the import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


def test_transformers_and_peft_load_from_it(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftConfig
    from transformers import AutoConfig

    point_clients_to(hub, monkeypatch)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    hub.publish("base/small", base)
    config = AutoConfig.from_pretrained("base/small", cache_dir=tmp_path / "cache")
    assert config.hidden_size == 32
    assert PeftConfig.from_pretrained(REPO, cache_dir=tmp_path / "cache").r == 2


# -- listings ------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[LocalHub]:
    """Seven adapters in pages of two; adapter n has n downloads."""
    folder = fill(tmp_path / "folder")
    with LocalHub(page_size=2) as hub:
        for number in range(7):
            hub.publish(f"ann/lora-{number}", folder, downloads=number, likes=-number)
        yield hub


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 7, 100])
def test_a_listing_comes_in_pages_without_loss_or_repetition(crowd: LocalHub, limit: int | None) -> None:
    api = HfApi(endpoint=crowd.url, token=False)
    found = [info.id for info in api.list_models(filter=["lora", "base_model:base/small"], search="LORA", limit=limit)]
    assert found == [f"ann/lora-{number}" for number in range(7)][:limit]
    assert len(crowd.requests) == -(-len(found) // 2)


def test_a_listing_is_sorted_from_the_largest(crowd: LocalHub) -> None:
    api = HfApi(endpoint=crowd.url, token=False)
    by_downloads = [info.downloads for info in api.list_models(sort="downloads")]
    assert by_downloads == [6, 5, 4, 3, 2, 1, 0]
    assert [info.downloads for info in api.list_models(sort="likes")] == by_downloads[::-1]
    times = [info.last_modified for info in api.list_models(sort="last_modified", full=True)]
    assert times == sorted(times, key=str, reverse=True)
    assert httpx.get(f"{crowd.url}/api/models?sort=size").status_code == 400


def test_a_listing_tells_no_more_than_it_is_asked_for(api: HfApi) -> None:
    (plain,) = api.list_models()
    (full,) = api.list_models(full=True)
    (wanted,) = api.list_models(expand=["sha", "cardData"])
    sha = api.model_info(REPO).sha
    assert (plain.sha, plain.siblings, plain.downloads) == (None, None, 0)
    assert full.sha == wanted.sha == sha
    assert full.siblings is not None
    assert wanted.card_data is not None
    assert (wanted.downloads, full.card_data) == (None, None)


# -- datasets ------------------------------------------------------------------------------------------------


def test_datasets_live_beside_models_of_the_same_name(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [small]\n---\n")
    sha = hub.publish_dataset(REPO, folder)
    info = api.dataset_info(REPO, files_metadata=True)
    assert info.sha == sha != api.model_info(REPO).sha
    assert {file.rfilename: file.size for file in info.siblings or ()} == {"README.md": 35, "data/train.jsonl": 14}
    assert [entry.path for entry in api.list_repo_tree(REPO, "data", repo_type="dataset")] == ["data/train.jsonl"]
    assert api.dataset_info(REPO, revision=sha[:10]).sha == sha
    assert [found.id for found in api.list_datasets(filter="small")] == [REPO]
    assert [found.id for found in api.list_models()] == [REPO]
    cache = tmp_path / "cache"
    file = hf_hub_download(REPO, "data/train.jsonl", repo_type="dataset", endpoint=hub.url, cache_dir=cache)
    assert Path(file).read_text() == '{"text": "a"}\n'
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("ann/other")


def test_faults_and_gates_of_datasets_are_their_own(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    hub.publish_dataset(REPO, fill(tmp_path / "data"), gated=True)
    hub.fail(f"datasets/{REPO}", status=503, path="README.md", times=1)
    url = f"{hub.url}/datasets/{REPO}/resolve/main/README.md"
    opened = {"Authorization": f"Bearer {hub.token}"}
    assert [httpx.get(url, headers=opened).status_code for _ in range(2)] == [503, 200]
    assert httpx.get(url).status_code == 401
    assert resolve(hub, "README.md").status_code == 200


# -- uploads -------------------------------------------------------------------------------------------------


@pytest.fixture
def writer(hub: LocalHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_secret")


def test_a_pushed_repository_is_served_as_any_other(hub: LocalHub, api: HfApi, writer: HfApi, tmp_path: Path) -> None:
    assert writer.create_repo("bob/new").repo_id == "bob/new"
    assert api.list_repo_files("bob/new") == [".gitattributes"]
    commit = writer.upload_folder(repo_id="bob/new", folder_path=fill(tmp_path / "folder")).oid
    assert api.model_info("bob/new").sha == commit
    folder = Path(snapshot_download("bob/new", endpoint=hub.url, cache_dir=tmp_path / "cache"))
    assert (folder / "notes" / "log.txt").read_bytes() == b"0123456789"
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS
    pushed, published = api.model_info("bob/new", files_metadata=True), api.model_info(REPO, files_metadata=True)
    assert [file for file in pushed.siblings or () if file.rfilename != ".gitattributes"] == published.siblings
    assert pushed.tags == published.tags


def test_what_did_not_change_is_not_sent_again(hub: LocalHub, writer: HfApi, tmp_path: Path) -> None:
    before = writer.model_info(REPO).sha
    folder = fill(tmp_path / "folder")
    assert writer.upload_folder(repo_id=REPO, folder_path=folder).oid == before
    fill(folder, weights=b"other")
    after = writer.upload_folder(repo_id=REPO, folder_path=folder).oid
    assert writer.model_info(REPO).sha == after != before
    assert writer.list_repo_files(REPO) == writer.list_repo_files(REPO, revision=before)


def test_files_and_folders_are_deleted(writer: HfApi) -> None:
    writer.delete_folder("notes", REPO)
    writer.delete_file("README.md", REPO)
    assert writer.list_repo_files(REPO) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        writer.delete_file("README.md", REPO)


def test_a_repository_is_created_once(hub: LocalHub, api: HfApi, writer: HfApi) -> None:
    writer.create_repo("bob/secret", private=True)
    with pytest.raises(HfHubHTTPError, match="already created"):
        writer.create_repo("bob/secret")
    assert writer.create_repo("bob/secret", exist_ok=True).repo_id == "bob/secret"
    assert writer.model_info("bob/secret").private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("bob/secret")
    writer.create_repo(REPO, repo_type="dataset")
    assert [found.id for found in api.list_datasets()] == [REPO]
    with pytest.raises(HfHubHTTPError, match="cannot be created"):
        writer.create_repo("bob/room", repo_type="space", space_sdk="static")


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_nobody_writes_without_the_token(hub: LocalHub, tmp_path: Path, token: str | bool) -> None:
    stranger, before = HfApi(endpoint=hub.url, token=token), hub.requests
    with pytest.raises(HfHubHTTPError) as caught:
        stranger.create_repo("bob/new")
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError) as caught:
        stranger.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO)
    assert caught.value.response.status_code == 401
    assert not [path for _, path in hub.requests[len(before) :] if "/commit/" in path]
    url = f"{hub.url}/api/models/{REPO}/commit/main"
    assert httpx.post(url, content='{"key": "header", "value": {}}').status_code == 401


def test_a_hub_without_a_token_takes_no_upload(tmp_path: Path) -> None:
    with LocalHub() as hub, pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_any").create_repo("bob/new")


def test_a_commit_on_what_is_not_there_any_more_is_refused(hub: LocalHub, writer: HfApi, tmp_path: Path) -> None:
    before = writer.model_info(REPO).sha
    hub.publish(REPO, fill(tmp_path / "moved", weights=b"moved"))

    def push(**options: Any) -> None:
        writer.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO, **options)

    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        push(parent_commit=before)
    for revision in ("nowhere", before):
        with pytest.raises(RevisionNotFoundError):
            push(revision=revision)


# -- what changes and what deceives --------------------------------------------------------------------------


def test_too_many_requests_name_the_seconds_to_wait(hub: LocalHub, api: HfApi) -> None:
    hub.fail(None, status=429, retry_after=7, times=2)
    answers = [httpx.get(f"{hub.url}/api/models"), resolve(hub, "README.md"), resolve(hub, "README.md")]
    assert [(answer.status_code, answer.headers.get("Retry-After")) for answer in answers] == [
        (429, "7"),
        (429, "7"),
        (200, None),
    ]


def test_a_branch_moves_between_two_requests(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    folder = fill(tmp_path / "moved", weights=b"moved")
    hub.after(2, lambda: hub.publish(REPO, folder))
    shas = [api.model_info(REPO).sha for _ in range(4)]
    assert shas[0] == shas[1] != shas[2] == shas[3]


def test_hostile_names_are_listed_and_served_as_they_stand(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    names = {"../../x": b"up", "/etc/x": b"absolute", "link": b"../../etc/passwd"}
    hub.publish("ann/hostile", fill(tmp_path / "hostile"), hostile=names)
    info = api.model_info("ann/hostile", files_metadata=True)
    assert set(names) <= {file.rfilename for file in info.siblings or ()}
    assert set(names) <= set(api.list_repo_files("ann/hostile"))
    with httpx.Client() as client:
        for name, content in names.items():
            path = f"/ann/hostile/resolve/main/{name.replace('/', '%2F')}".encode()
            assert client.get(httpx.URL(hub.url).copy_with(raw_path=path)).content == content
    assert not (tmp_path.parent / "x").exists()
