"""Pulling: from a repository id or a folder to files on disk, at one exact revision."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from lora_hub_sdk.errors import (
    AdmissionError,
    ConfigurationError,
    DownloadError,
    RepoAccessError,
    RepoNotFoundError,
    SourceError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.registry._hub_cache import HubCache, is_whole
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
from lora_hub_sdk.registry.admission import WEIGHTS_FILE, Limits

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

CARD: Final = "README.md"

_SHA = re.compile(r"[0-9a-f]{40}")
_PICKLED_WEIGHTS = re.compile(r"(adapter_model|pytorch_model|pytorch_lora_weights).*\.(bin|pt|pth|pkl|ckpt)")
_LOOKS_LIKE_A_PATH = re.compile(r"[/.~]|[A-Za-z]:|.*\\", re.DOTALL)
#: Seconds before the second and the third try.
_WAITS = (0.2, 0.6)


@dataclass(frozen=True, slots=True)
class Pulled:
    """An adapter's files at one revision, not yet admitted.

    ``repo_id`` and ``revision`` are the Hub's id and 40 hex digits; for a local folder they are its resolved
    path and "". ``license``, ``description`` and ``tags`` come from the card's YAML header.
    ``pickle_files`` names the pickled weights of a source without safetensors; they are never downloaded.
    """

    repo_id: str
    revision: str
    folder: Path
    license: str | None
    description: str | None
    tags: tuple[str, ...]
    is_local: bool
    pickle_files: tuple[str, ...] = ()


class HubSource:
    """Pulls adapters from a Hub or from folders. It keeps no state of its own and is thread-safe.

    Args:
        endpoint: a Hub other than the configured one (https://huggingface.co).
        token: opens private and gated repositories; None uses the one that huggingface_hub finds.
        cache_dir: huggingface_hub's cache; None for its usual place.
        timeout: seconds that the Hub may stay silent when asked for a revision or for a file's metadata.
            Silence in the middle of a file is bounded by huggingface_hub's own HF_HUB_DOWNLOAD_TIMEOUT.
        limits: weights larger than these are not downloaded at all.

    Raises:
        ConfigurationError: the token cannot be sent in a header.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        timeout: float = 10.0,
        limits: Limits | None = None,
    ) -> None:
        # The HTTP library would quote such a token in its own message.
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise ConfigurationError("the Hub token is empty or holds characters that no token has; check it")
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._token = token
        self._cache = HubCache(cache_dir)
        self._timeout = timeout
        self._limits = limits or Limits()

    def pull(self, reference: str | Path, revision: str | None = None) -> Pulled:
        """Put the configuration, the weights and the card of an adapter on disk.

        A folder that exists is taken as it stands. Everything else is a repository: its revision is resolved
        to a commit, and exactly that commit is downloaded. A commit that is whole in the cache needs no
        request; a branch that was pulled before comes from the cache while the Hub is unreachable.

        Args:
            reference: a repository id, or a folder.
            revision: branch, tag or commit of a repository; None for its main branch.

        Raises:
            ConfigurationError: an empty reference, or a revision for a local folder.
            RepoNotFoundError: neither a folder nor a repository.
            RepoAccessError: private or gated, and the token does not open it. Without a token, the Hub gives
                one answer for missing and for private repositories; that error is of both types.
            RevisionNotFoundError: the repository has no such revision.
            UnsupportedFeatureError: the weights are larger than the limit.
            DownloadError: anything else that kept the files from being complete on disk.
        """
        text = str(reference)
        if not text.strip() or revision == "":
            raise ConfigurationError(f"cannot pull {text!r} at revision {revision!r}; neither may be empty")
        # The functions of os.path have an answer for every text, those of pathlib raise for some.
        path = os.path.expanduser(text)
        if os.path.isdir(path):
            if revision is not None:
                raise ConfigurationError(f"{text!r} is a local folder, which has no revisions; leave it out")
            return _from_folder(Path(path).resolve())
        if isinstance(reference, Path) or _LOOKS_LIKE_A_PATH.match(text):
            raise RepoNotFoundError(
                f"{text!r} {'is a file' if os.path.exists(path) else 'does not exist'}; "
                f"give a folder with {CONFIG_FILE}, or a repository id like 'owner/name'",
                repo_id=text,
                revision=revision,
            )
        # The one border to a client that raises the types of three libraries: whatever comes, leaves as ours.
        try:
            return self._pull_repo(text, revision)
        except (SourceError, AdmissionError):
            raise
        except Exception as error:
            from lora_hub_sdk.registry._source_errors import translate

            raise translate(error, repo_id=text, revision=revision, token=self._token) from error

    def _pull_repo(self, repo_id: str, revision: str | None) -> Pulled:
        from lora_hub_sdk.registry._source_errors import is_outage, is_unreachable, is_unretried_outage

        pinned = self._from_cache(repo_id, revision) if _SHA.fullmatch(revision or "") else None
        if pinned is not None:
            return pinned
        try:
            sha, listing = _retried(partial(self._ask, repo_id, revision), is_outage)
        except Exception as error:
            last_known = self._from_cache(repo_id, revision) if is_unreachable(error) else None
            if last_known is None:
                raise
            _log.warning("the Hub is unreachable; %s is the cached %s", repo_id, last_known.revision)
            return last_known
        size = listing.get(WEIGHTS_FILE) or 0
        if size > self._limits.max_bytes:
            raise UnsupportedFeatureError(repo_id, "size in bytes", size)
        # Not snapshot_download: it lists the repository without a time limit; 2.x also hides why that failed.
        for name in (CARD, CONFIG_FILE, WEIGHTS_FILE):
            _retried(partial(self._download, repo_id, sha, name, listing), is_unretried_outage)
        self._cache.note_branch(repo_id, revision or "main", sha)
        folder = self._cache.snapshot(repo_id, sha)
        folder.mkdir(parents=True, exist_ok=True)
        return _pulled(folder, repo_id, sha, names=listing)

    def _ask(self, repo_id: str, revision: str | None) -> tuple[str, Mapping[str, int | None]]:
        """The commit behind a revision, and the sizes of its files by name."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self._endpoint, token=self._token, library_name="lora_hub_sdk")
        ask = partial(api.model_info, repo_id, revision=revision, timeout=self._timeout)
        try:
            info = ask(files_metadata=True)
        except (TypeError, AttributeError):
            # A header like "tags: 7" breaks the client's own reading of the answer; ask without the card.
            info = ask(expand=["sha", "siblings"])
        if info.sha is None or not _SHA.fullmatch(info.sha):
            raise ValueError(f"the endpoint named no commit for it but {info.sha!r}")
        if info.siblings is not None:
            return info.sha, {file.rfilename: file.size for file in info.siblings}
        # Mirrors leave them out.
        tree = api.list_repo_tree(repo_id, revision=info.sha, recursive=True)
        return info.sha, {file.path: file.size for file in tree if isinstance(file, RepoFile)}

    def _download(self, repo_id: str, sha: str, name: str, listing: Mapping[str, int | None]) -> None:
        """One file into the cache, or, where the repository has none, the fact of its absence."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        get = partial(
            hf_hub_download,
            repo_id,
            name,
            revision=sha,
            endpoint=self._endpoint,
            token=self._token,
            cache_dir=self._cache.root,
            etag_timeout=self._timeout,
            library_name="lora_hub_sdk",
        )
        try:
            # A file of this commit that is in the cache is returned as it lies there, whole or not.
            size = listing.get(name)
            whole = is_whole(Path(get()), size) or is_whole(Path(get(force_download=True)), size)
        except RemoteEntryNotFoundError:
            if name in listing:
                raise
            # The client notes the absence itself only where the answer names the commit; mirrors do not.
            self._cache.note_absence(repo_id, sha, name)
            return
        if not whole:
            raise DownloadError(
                f"{name} of {repo_id!r} arrived with another size or checksum than the Hub lists; try again",
                repo_id=repo_id,
                revision=sha,
            )

    def _from_cache(self, repo_id: str, revision: str | None) -> Pulled | None:
        folder = self._cache.find(repo_id, revision, needed=(WEIGHTS_FILE, CONFIG_FILE), asked=(CARD,))
        return None if folder is None else _pulled(folder, repo_id, folder.name, names=(WEIGHTS_FILE,))


def _retried(call: Callable[[], _T], passes: Callable[[Exception], bool]) -> _T:
    """The answer of ``call``, tried again after errors that may pass."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            if not passes(error):
                raise
        time.sleep(wait)
    return call()


def _from_folder(folder: Path) -> Pulled:
    try:
        names = os.listdir(folder)
    except OSError as error:
        problem = f"folder {str(folder)!r} cannot be read ({error.strerror}); check its permissions"
        raise RepoAccessError(problem, repo_id=str(folder)) from error
    return _pulled(folder, names=names)


def _pulled(folder: Path, repo_id: str | None = None, revision: str = "", *, names: Iterable[str]) -> Pulled:
    names = frozenset(names)
    pickles = [] if WEIGHTS_FILE in names else sorted(name for name in names if _PICKLED_WEIGHTS.fullmatch(name))
    card = read_card(folder / CARD)
    return Pulled(
        repo_id=repo_id or str(folder),
        revision=revision,
        folder=folder,
        license=card.license,
        description=card.description,
        tags=card.tags,
        is_local=repo_id is None,
        pickle_files=tuple(pickles),
    )
