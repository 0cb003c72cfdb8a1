"""Pulling through the real client from a local Hub."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hf

from lora_hub_sdk.errors import (
    ConfigurationError,
    DownloadError,
    OutOfBoundsError,
    RepoAccessError,
    RepoNotFoundError,
    RevisionNotFoundError,
    SourceError,
)
from lora_hub_sdk.registry._source_errors import translate
from lora_hub_sdk.registry.admission import Limits
from lora_hub_sdk.registry.source import HubSource, Pulled
from lora_hub_sdk.testing import LocalHub, _hub_http
from lora_hub_sdk.testing._hub_store import Commit, Repo

#: The HTTP library under the client: httpx for 1.x, httpx2 for 2.x.
http = importlib.import_module(hf.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])

REPO = "ann/lora"
WEIGHTS = "adapter_model.safetensors"
TOKEN = "hf_TheSecretOfAnn"
CARD = "---\nlicense: mit\ndescription: Sentiment of reviews.\ntags: [lora, sst2]\n---\n# An adapter\n"


def fill(folder: Path, weights: bytes | None = b"w" * 3000, card: str | bytes | None = CARD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    (folder / "training_args.bin").write_bytes(b"pickle")
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
    if card is not None:
        (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    fill(tmp_path / "repos" / "ann" / "lora")
    with LocalHub(tmp_path / "repos", token=TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """For the many tests in which the client fails by itself."""
    folder = tmp_path_factory.mktemp("repos")
    fill(folder / "ann" / "lora")
    with LocalHub(folder) as hub:
        yield hub


@pytest.fixture
def source(hub: LocalHub, tmp_path: Path) -> HubSource:
    return source_at(hub, tmp_path)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Persistent faults meet every retry of the client: 23 seconds of sleep for one file."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture(autouse=True)
def no_token_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


def source_at(hub: LocalHub, tmp_path: Path, token: str | None = None) -> HubSource:
    return HubSource(endpoint=hub.url, token=token, cache_dir=tmp_path / "cache")


def files(pulled: Pulled) -> list[str]:
    return sorted(path.name for path in pulled.folder.iterdir())


# -- what arrives --------------------------------------------------------------------------------------------


def test_pull_brings_the_three_files_of_one_commit(hub: LocalHub, source: HubSource) -> None:
    pulled = source.pull(REPO)
    assert files(pulled) == ["README.md", "adapter_config.json", WEIGHTS]
    assert (pulled.folder / WEIGHTS).read_bytes() == b"w" * 3000
    assert re.fullmatch("[0-9a-f]{40}", pulled.revision)
    assert (pulled.repo_id, pulled.is_local, pulled.pickle_files) == (REPO, False, ())
    assert (pulled.license, pulled.description) == ("mit", "Sentiment of reviews.")
    assert pulled.tags == ("lora", "sst2")


def test_a_moved_branch_is_noticed_and_the_old_commit_stays(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    old = source.pull(REPO)
    sha = hub.publish(REPO, fill(tmp_path / "new", b"new"))
    new = source.pull(REPO)
    assert new.revision == sha != old.revision
    assert (new.folder / WEIGHTS).read_bytes() == b"new"
    assert (source.pull(REPO, old.revision).folder / WEIGHTS).read_bytes() == b"w" * 3000


def test_branches_are_revisions_too(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    sha = hub.publish(REPO, fill(tmp_path / "other", b"other"), branch="feature/x")
    assert source.pull(REPO, "feature/x").revision == sha != source.pull(REPO).revision


@pytest.mark.parametrize("card", [CARD, None])
def test_a_pinned_commit_in_the_cache_makes_no_request(
    hub: LocalHub, source: HubSource, tmp_path: Path, card: str | None
) -> None:
    sha = hub.publish("ann/pinned", fill(tmp_path / "pinned", card=card))
    pulled = source.pull("ann/pinned", sha)
    before = hub.requests
    assert source.pull("ann/pinned", sha) == pulled
    assert hub.requests == before


def test_pickles_are_named_and_not_downloaded(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    folder = fill(tmp_path / "pickled", weights=None)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    hub.publish("ann/pickled", folder)
    pulled = source.pull("ann/pickled")
    assert pulled.pickle_files == source.pull(folder).pickle_files == ("adapter_model.bin",)
    assert files(pulled) == ["README.md", "adapter_config.json"]
    assert not [path for _, path in hub.requests if path.endswith(".bin")]


def test_a_repository_that_is_no_adapter_is_left_to_admission(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hub.publish("ann/empty", tmp_path / "empty")
    pulled = source.pull("ann/empty")
    assert (files(pulled), pulled.pickle_files) == ([], ())


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_mirror_that_leaves_out_the_listing(
    hub: LocalHub, source: HubSource, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    def info(repo: Repo, commit: Commit, **options: bool) -> dict[str, str]:
        return {"id": repo.id, "sha": commit.sha}

    monkeypatch.setattr(_hub_http, "_info", info)
    assert files(source.pull(REPO, revision)) == ["README.md", "adapter_config.json", WEIGHTS]


def test_a_cache_that_takes_no_notes(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    refs = tmp_path / "cache" / "models--ann--lora" / "refs"
    refs.parent.mkdir(parents=True)
    refs.write_text("in the way")
    assert source.pull(REPO).folder.is_dir()


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# No header",
        "---\n: [broken\n---\n",
        "---\n- a list\n---\n",
        "---\nmodel-index: 7\ntags: 7\nlicense: [1]\n---\n",
        b"---\n\xff\xfe\n---\n",
        "---\ndatasets: &a [*a]\n---\n",
    ],
)
def test_a_broken_card_costs_nothing_but_itself(
    hub: LocalHub, source: HubSource, tmp_path: Path, card: str | bytes | None
) -> None:
    hub.publish("ann/carded", fill(tmp_path / "carded", card=card))
    pulled = source.pull("ann/carded")
    assert (pulled.license, pulled.description, pulled.tags) == (None, None, ())
    assert (pulled.folder / WEIGHTS).is_file()


# -- local folders -------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_stands(
    hub: LocalHub, source: HubSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    for reference in (folder, str(folder), "mine", "./mine"):
        pulled = source.pull(reference)
        assert (pulled.repo_id, pulled.revision, pulled.is_local) == (str(folder), "", True)
        assert (pulled.folder, pulled.license) == (folder, "mit")
    assert not hub.requests


def test_a_folder_has_no_revision(source: HubSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no revision"):
        source.pull(fill(tmp_path / "mine"), "main")


@pytest.mark.parametrize(
    "reference",
    [
        "/no/such",
        "./no",
        "../no",
        "~/no",
        "~nobody-here/x",
        "/" + "x" * 300,
        r"a\b",
        r"C:\no",
        Path("a/b"),
        "a/b/c",
        "a b",
        "hf://a/b",
    ],
)
def test_what_is_neither_folder_nor_id_makes_no_request(
    hub: LocalHub, source: HubSource, reference: str | Path
) -> None:
    with pytest.raises(RepoNotFoundError) as caught:
        source.pull(reference)
    assert str(reference) in str(caught.value).replace(r"\\", "\\")
    assert not hub.requests


def test_a_folder_that_cannot_be_read(source: HubSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(RepoAccessError, match="cannot be read"):
        source.pull(tmp_path)


def test_a_file_is_no_folder(source: HubSource, tmp_path: Path) -> None:
    with pytest.raises(RepoNotFoundError, match="is a file"):
        source.pull(fill(tmp_path / "mine") / WEIGHTS)


@pytest.mark.parametrize(("reference", "revision"), [("", None), (" ", None), (REPO, "")])
def test_empty_arguments(source: HubSource, reference: str, revision: str | None) -> None:
    with pytest.raises(ConfigurationError):
        source.pull(reference, revision)


# -- refusals ------------------------------------------------------------------------------------------------


def test_missing_repository(source: HubSource) -> None:
    with pytest.raises(RepoNotFoundError, match="ann/nothing") as caught:
        source.pull("ann/nothing")
    assert isinstance(caught.value, LookupError)
    assert caught.value.repo_id == "ann/nothing"


@pytest.mark.parametrize("revision", ["nowhere", "0" * 40])
def test_missing_revision(source: HubSource, revision: str) -> None:
    with pytest.raises(RevisionNotFoundError, match=revision) as caught:
        source.pull(REPO, revision)
    assert caught.value.revision == revision


@pytest.mark.parametrize("token", [None, "hf_NotTheRightOne"])
@pytest.mark.parametrize("closed", ["private", "gated"])
def test_closed_repositories(hub: LocalHub, tmp_path: Path, closed: str, token: str | None) -> None:
    sha = hub.publish("ann/closed", fill(tmp_path / "closed"), private=closed == "private", gated=closed == "gated")
    with pytest.raises(RepoAccessError) as caught:
        source_at(hub, tmp_path, token).pull("ann/closed")
    assert isinstance(caught.value, PermissionError)
    assert "hf_" not in str(caught.value)
    assert source_at(hub, tmp_path, TOKEN).pull("ann/closed").revision == sha


def test_without_a_token_private_and_missing_look_alike(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    hub.publish("ann/private", fill(tmp_path / "private"), private=True)
    with pytest.raises(RepoNotFoundError, match="does not exist on the Hub, or is private"):
        source.pull("ann/private")


@pytest.mark.parametrize("token", ["", "hf_two\nlines", "hf with space", "hf_ü"])
def test_a_token_that_no_header_can_hold(token: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        HubSource(token=token)
    assert not token or token not in str(caught.value)


# -- trouble on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", [None, WEIGHTS])
@pytest.mark.usefixtures("no_waiting")
def test_trouble_that_passes(hub: LocalHub, source: HubSource, path: str | None, status: int) -> None:
    hub.fail(REPO, status=status, path=path, times=2)
    assert (source.pull(REPO).folder / WEIGHTS).read_bytes() == b"w" * 3000


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("path", [None, WEIGHTS])
@pytest.mark.usefixtures("no_waiting")
def test_trouble_that_stays(hub: LocalHub, source: HubSource, path: str | None, status: int) -> None:
    hub.fail(REPO, status=status, path=path)
    with pytest.raises(DownloadError, match=str(status)) as caught:
        source.pull(REPO)
    assert isinstance(caught.value, OSError)
    hub.heal()
    assert (source.pull(REPO).folder / WEIGHTS).is_file()


def test_one_short_trouble_costs_little_time(hub: LocalHub, source: HubSource) -> None:
    hub.fail(REPO, status=502, times=1)
    started = time.monotonic()
    source.pull(REPO)
    assert time.monotonic() - started < 1


@pytest.mark.usefixtures("no_waiting")
def test_a_listed_file_that_is_not_served(hub: LocalHub, source: HubSource) -> None:
    hub.fail(REPO, status=404, path=WEIGHTS)
    with pytest.raises(DownloadError):
        source.pull(REPO)


@pytest.mark.parametrize("keep", [0, 1000, 2999])
@pytest.mark.usefixtures("no_waiting")
def test_a_truncated_file_is_never_taken_as_complete(
    hub: LocalHub, source: HubSource, tmp_path: Path, keep: int
) -> None:
    sha = hub.publish(REPO, fill(tmp_path / "again"))
    hub.truncate(REPO, WEIGHTS, keep)
    for _ in range(2):
        with pytest.raises(DownloadError):
            source.pull(REPO, sha)
    hub.heal()
    assert (source.pull(REPO, sha).folder / WEIGHTS).read_bytes() == b"w" * 3000


@pytest.mark.usefixtures("no_waiting")
def test_a_download_that_broke_once_is_resumed(hub: LocalHub, source: HubSource) -> None:
    hub.truncate(REPO, WEIGHTS, 1000, times=1)
    assert (source.pull(REPO).folder / WEIGHTS).read_bytes() == b"w" * 3000


@pytest.mark.parametrize("damage", [b"", b"w" * 100, b"v" * 3000])
def test_a_damaged_cache_is_mended(hub: LocalHub, source: HubSource, damage: bytes) -> None:
    pulled = source.pull(REPO)
    (pulled.folder / WEIGHTS).resolve().write_bytes(damage)
    assert (source.pull(REPO, pulled.revision).folder / WEIGHTS).read_bytes() == b"w" * 3000
    (pulled.folder / "adapter_config.json").resolve().write_bytes(b"")
    assert (source.pull(REPO, pulled.revision).folder / "adapter_config.json").stat().st_size > 0


def test_weights_over_the_limit_are_not_downloaded(hub: LocalHub, tmp_path: Path) -> None:
    source = HubSource(endpoint=hub.url, cache_dir=tmp_path / "cache", limits=Limits(max_bytes=10))
    with pytest.raises(OutOfBoundsError, match="size in bytes"):
        source.pull(REPO)
    assert not [path for _, path in hub.requests if "/resolve/" in path]


def test_a_silent_hub_is_given_up(hub: LocalHub, tmp_path: Path) -> None:
    hub.delay(30)
    started = time.monotonic()
    with pytest.raises(DownloadError, match="Timeout"):
        HubSource(endpoint=hub.url, cache_dir=tmp_path / "cache", timeout=0.1).pull(REPO)
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("no_waiting")
def test_an_endpoint_that_is_no_hub(tmp_path: Path) -> None:
    for endpoint in ("http://127.0.0.1:9", "not-a-url", "http://[broken"):
        with pytest.raises(DownloadError, match="could not be downloaded"):
            HubSource(endpoint=endpoint, cache_dir=tmp_path / "cache").pull(REPO)


def test_a_cache_that_cannot_be_written(hub: LocalHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError):
        HubSource(endpoint=hub.url, cache_dir=tmp_path / "file").pull(REPO)


# -- without a Hub -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "main"])
@pytest.mark.usefixtures("no_waiting")
def test_a_branch_comes_from_the_cache_while_the_hub_is_down(
    hub: LocalHub, source: HubSource, revision: str | None
) -> None:
    pulled = source.pull(REPO)
    hub.fail(REPO, status=503)
    assert source.pull(REPO, revision) == pulled
    hub.close()
    assert source.pull(REPO, revision) == source.pull(REPO, pulled.revision) == pulled
    with pytest.raises(DownloadError):
        source.pull(REPO, "never-pulled")
    with pytest.raises(DownloadError):
        source.pull("ann/never-pulled")


def test_offline_mode(hub: LocalHub, source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = source.pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert source.pull(REPO) == pulled
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        source.pull("ann/never-pulled")


def test_a_refusal_is_not_answered_from_the_cache(hub: LocalHub, source: HubSource, tmp_path: Path) -> None:
    source.pull(REPO)
    hub.publish(REPO, fill(tmp_path / "again"), private=True)
    with pytest.raises(RepoAccessError):
        source.pull(REPO)


@pytest.mark.usefixtures("no_waiting")
def test_an_incomplete_copy_does_not_count(hub: LocalHub, source: HubSource) -> None:
    hub.fail(REPO, status=500, path=WEIGHTS)
    with pytest.raises(DownloadError):
        source.pull(REPO)
    hub.close()
    with pytest.raises(DownloadError):
        source.pull(REPO)


# -- the map of foreign errors -------------------------------------------------------------------------------


def http_errors() -> list[Exception]:
    found: list[Exception] = []
    for module in (http, hf):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Exception) and kind.__module__.startswith(("httpx", "huggingface_hub")):
                found += [instance(kind, status) for status in statuses(kind)]
    return found


def statuses(kind: type[Exception]) -> tuple[int, ...]:
    return (401, 403, 404, 429, 500) if issubclass(kind, hf.HfHubHTTPError) else (0,)


def instance(kind: type[Exception], status: int) -> Exception:
    """An error as its library would raise it, with a token where a careless one would quote it."""
    message = f"at https://user:word@host/x?sig=abc with Bearer {TOKEN}"
    # Past the constructors, each of which wants other arguments.
    error = kind.__new__(kind, message)
    error.args = (message,)
    if isinstance(error, hf.HfHubHTTPError):
        error.response = http.Response(status, request=http.Request("GET", "http://host/x"))
    return error


@pytest.mark.parametrize("error", http_errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["HfApi.model_info", "hf_hub_download"])
@pytest.mark.usefixtures("no_waiting")
def test_no_foreign_error_escapes_and_none_shows_a_secret(
    shared_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(f"huggingface_hub.{where}", fail)
    source = source_at(shared_hub, tmp_path, TOKEN)
    with pytest.raises(SourceError) as caught:
        source.pull(REPO)
    assert caught.value.__cause__ is error
    for secret in (TOKEN, "word@", "sig="):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "status", "expected"),
    [
        (hf.RepositoryNotFoundError, 404, RepoNotFoundError),
        (hf.RepositoryNotFoundError, 401, RepoAccessError),
        (hf.GatedRepoError, 403, RepoAccessError),
        (hf.GatedRepoError, 401, RepoAccessError),
        (hf.DisabledRepoError, 403, RepoAccessError),
        (hf.HfHubHTTPError, 401, RepoAccessError),
        (hf.HfHubHTTPError, 403, RepoAccessError),
        (hf.HfHubHTTPError, 404, RepoNotFoundError),
        (hf.RevisionNotFoundError, 404, RevisionNotFoundError),
        (hf.RemoteEntryNotFoundError, 404, DownloadError),
        (hf.BadRequestError, 400, DownloadError),
        (hf.HfHubHTTPError, 503, DownloadError),
        (hf.HFValidationError, 0, RepoNotFoundError),
        (hf.OfflineModeIsEnabled, 0, DownloadError),
        (http.ConnectError, 0, DownloadError),
        (http.ReadError, 0, DownloadError),
        (OSError, 0, DownloadError),
        (ValueError, 0, DownloadError),
    ],
)
def test_each_error_finds_its_own(kind: type[Exception], status: int, expected: type[SourceError]) -> None:
    error = instance(kind, status) if kind.__module__ != "builtins" else kind("disk")
    found = translate(error, repo_id=REPO, revision=None, token=None)
    assert isinstance(found, expected)
    # The client wraps the Hub's answer once it has looked into the cache in vain.
    wrapped = hf.LocalEntryNotFoundError("not in the cache either")
    wrapped.__cause__ = error
    assert type(translate(wrapped, repo_id=REPO, revision=None, token=None)) is type(found)


def test_importing_the_source_is_cheap() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'peft', 'huggingface_hub') if m in sys.modules]"
    code = f"import sys, lora_hub_sdk.registry.source; print({heavy})"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
