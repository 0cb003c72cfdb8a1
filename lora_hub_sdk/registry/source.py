"""Pulling: from a repository id or a folder to files on disk, at one exact revision."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from urllib.parse import quote, urlsplit

from lora_hub_sdk.errors import (
    AdmissionError,
    ConfigurationError,
    DownloadError,
    OutOfBoundsError,
    RepoAccessError,
    RepoNotFoundError,
    SourceError,
    UnsupportedFeatureError,
)
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.registry._hub_cache import HubCache, is_whole
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
from lora_hub_sdk.registry.adapter_tokens import LARGEST, TEMPLATE_FILE, TOKENIZER_FILE
from lora_hub_sdk.registry.admission import WEIGHTS_FILE, Limits

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

CARD: Final = "README.md"

_SHA = re.compile(r"[0-9a-f]{40}")
_PICKLED_WEIGHTS = re.compile(r"(adapter_model|pytorch_model|pytorch_lora_weights).*\.(bin|pt|pth|pkl|ckpt)")
_LOOKS_LIKE_A_PATH = re.compile(r"[/.~]|[A-Za-z]:|.*\\", re.DOTALL)
#: Seconds before the second and the third try, and the longest that a Hub's own "Retry-After" is waited for.
_WAITS = (0.2, 0.6)
_LONGEST_WAIT = 10.0
#: Seconds for one answer held in memory, so that a Hub that sends a byte now and then does not hold us for ever.
_LONGEST_ANSWER = 120.0


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


@dataclass(frozen=True, slots=True)
class Answer:
    """What the Hub sent. ``next_query`` asks for a listing's next page, None on its last."""

    body: bytes
    next_query: str | None = None


class HubSource:
    """Pulls adapters from a Hub or from folders. It keeps no state of its own and is thread-safe.

    Args:
        endpoint: a Hub other than the configured one (https://huggingface.co).
        token: opens private and gated repositories; None uses the one that huggingface_hub finds, False none.
        cache_dir: huggingface_hub's cache; None for its usual place.
        timeout: seconds that the Hub may stay silent when asked for a revision or for a file's metadata.
            Silence in the middle of a file is bounded by huggingface_hub's own HF_HUB_DOWNLOAD_TIMEOUT.
        limits: weights larger than these are not downloaded at all.
        offline: make no request at all; only what is in the cache can be pulled.
        note_pull: told (snapshot folder, repository, commit) before a commit that was not there is put into the cache.

    Raises:
        ConfigurationError: the token cannot be sent in a header.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | Literal[False] | None = None,
        cache_dir: Path | None = None,
        timeout: float = 10.0,
        limits: Limits | None = None,
        offline: bool = False,
        note_pull: Callable[[Path, str, str], None] | None = None,
    ) -> None:
        # The HTTP library would quote such a token in its own message.
        if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
            raise ConfigurationError("the Hub token is empty or holds characters that no token has; check it")
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._token = token
        self._cache = HubCache(cache_dir)
        self._timeout = timeout
        self._limits = limits or Limits()
        self._offline = offline
        self._note_pull = note_pull

    def pull(self, reference: str | Path, revision: str | None = None, *, lease: ExitStack | None = None) -> Pulled:
        """Put the configuration, the weights, the card and what is said of a tokenizer of an adapter on disk.

        A folder that exists is taken as it stands. Everything else is a repository: its revision is resolved
        to a commit, and exactly that commit is downloaded. A commit that is whole in the cache needs no
        request; a branch that was pulled before comes from the cache while the Hub is unreachable.

        Args:
            reference: a repository id, or a folder.
            revision: branch, tag or commit of a repository; None for its main branch.
            lease: until it is closed, nobody collects the commit's files; the same commit is pulled by one at a time.

        Raises:
            ConfigurationError: an empty reference, or a revision for a local folder.
            RepoNotFoundError: neither a folder nor a repository.
            RepoAccessError: private or gated, and the token does not open it. Without a token, the Hub gives
                one answer for missing and for private repositories; that error is of both types.
            RevisionNotFoundError: the repository has no such revision.
            OutOfBoundsError: the weights are larger than the limit.
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
        with ExitStack() as own:
            return self._translated(partial(self._pull_repo, text, revision, lease or own), text, revision)

    def fetch(
        self, repo_id: str, path: str, revision: str, *, max_bytes: int, kind: Literal["models", "datasets"] = "models"
    ) -> bytes:
        """One file of a repository, in memory and never on disk.

        Raises:
            OutOfBoundsError: it is larger than ``max_bytes``.
            UnsupportedFeatureError: its name leads out of the repository.
            SourceError: as ``pull``.
        """
        if not path or any(part in ("", ".", "..") for part in path.split("/")):
            raise UnsupportedFeatureError(repo_id, "file name", path)
        owner = "" if kind == "models" else f"/{kind}"
        place = f"{owner}/{quote(repo_id)}/resolve/{quote(revision, safe='')}/{quote(path)}"
        return self.get(place, asked=repo_id, revision=revision, max_bytes=max_bytes).body

    def get(
        self, path: str, *, asked: str, query: str = "", revision: str | None = None, max_bytes: int = 10 << 20
    ) -> Answer:
        """What the Hub answers at ``path``, held in memory.

        Unlike with HfApi, which has no time limit for listings and no size limit for anything, the Hub may stay silent
        for ``timeout`` seconds only, and send no more than ``max_bytes``.

        Args:
            asked: what an error says was asked for; where it is asked of a repository, its id.

        Raises:
            OutOfBoundsError: the answer is larger.
            SourceError: as ``pull``.
        """
        from lora_hub_sdk.registry._source_errors import is_outage

        once = partial(self._get_once, path, query, asked, revision, max_bytes)
        return self._translated(lambda: _retried(once, is_outage), asked, revision)

    def _translated(self, call: Callable[[], _T], asked: str, revision: str | None) -> _T:
        # The one border to a client that raises the types of three libraries: whatever comes, leaves as ours.
        try:
            return call()
        except (SourceError, AdmissionError):
            raise
        except Exception as error:
            from lora_hub_sdk.registry._source_errors import translate

            raise translate(error, repo_id=asked, revision=revision, token=self._token or None) from error

    def _get_once(self, path: str, query: str, asked: str, revision: str | None, max_bytes: int) -> Answer:
        if self._offline:
            raise _offline_error(asked, revision)
        from huggingface_hub import constants, get_session, utils

        client: Any = utils  # its public functions are not marked as exported
        headers = client.build_hf_headers(token=self._token, library_name="lora_hub_sdk")
        # Packed content could be a thousand times larger than what is counted on the way.
        headers["Accept-Encoding"] = "identity"
        url = f"{self._endpoint or constants.ENDPOINT}{path}{'?' if query else ''}{query}"
        deadline = time.monotonic() + _LONGEST_ANSWER
        body = bytearray()
        with get_session().stream("GET", url, headers=headers, timeout=self._timeout) as response:
            client.hf_raise_for_status(response)
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise OutOfBoundsError(asked, "its size in bytes, of which no more was read,", len(body), max_bytes)
                if time.monotonic() > deadline:
                    raise DownloadError(f"{asked!r} did not arrive in {_LONGEST_ANSWER:g} s", repo_id=asked)
            # Only the link's query: a token goes nowhere but to the endpoint.
            following = response.links.get("next", {}).get("url")
        return Answer(bytes(body), urlsplit(following).query if following else None)

    def _pull_repo(self, repo_id: str, revision: str | None, lease: ExitStack) -> Pulled:
        from lora_hub_sdk.registry._source_errors import is_outage, is_unreachable, is_unretried_outage

        is_pinned = _SHA.fullmatch(revision or "") is not None
        cached = self._from_cache(repo_id, revision, lease) if is_pinned or self._offline else None
        if cached is not None:
            return cached
        if self._offline:
            raise _offline_error(repo_id, revision)
        try:
            sha, listing = _retried(partial(self._ask, repo_id, revision), is_outage)
        except Exception as error:
            # A pinned commit was looked for above, and its lease cannot be taken twice.
            can_be_old = is_unreachable(error) and not is_pinned
            last_known = self._from_cache(repo_id, revision, lease) if can_be_old else None
            if last_known is None:
                raise
            _log.warning("the Hub is unreachable; %s is the cached %s", repo_id, last_known.revision)
            return last_known
        size = listing.get(WEIGHTS_FILE) or 0
        if size > self._limits.max_bytes:
            raise OutOfBoundsError(repo_id, "size in bytes", size, self._limits.max_bytes)
        for name in (TOKENIZER_FILE, TEMPLATE_FILE):
            if (size := listing.get(name) or 0) > LARGEST:
                raise OutOfBoundsError(repo_id, f"the size of {name} in bytes", size, LARGEST)
        if sha != revision:  # that one is held already
            lease.enter_context(self._cache.lease(repo_id, sha))
        folder = self._cache.snapshot(repo_id, sha)
        # What lay there before was put there by somebody else, and is theirs to remove.
        if self._note_pull is not None and not folder.exists():
            self._note_pull(folder, repo_id, sha)
        # Not snapshot_download: it lists the repository without a time limit; 2.x also hides why that failed.
        # The weights come last: where they are in the cache, so is what else there was.
        for name in (CARD, CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE, WEIGHTS_FILE):
            if name in listing:
                _retried(partial(self._download, repo_id, sha, name, listing), is_unretried_outage)
            else:
                self._cache.note_absence(repo_id, sha, name)
        self._cache.note_branch(repo_id, revision or "main", sha)
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

    def _from_cache(self, repo_id: str, revision: str | None, lease: ExitStack) -> Pulled | None:
        find = partial(self._cache.find, repo_id, needed=(WEIGHTS_FILE, CONFIG_FILE), asked=(CARD,))
        sha = revision
        if not _SHA.fullmatch(revision or ""):
            last = find(revision)
            sha = None if last is None else last.name
        if sha is None:
            return None
        lease.enter_context(self._cache.lease(repo_id, sha))
        folder = find(sha)  # it may have been collected while this waited
        return None if folder is None else _pulled(folder, repo_id, folder.name, names=(WEIGHTS_FILE,))


def _retried(call: Callable[[], _T], passes: Callable[[Exception], bool]) -> _T:
    """The answer of ``call``, tried again after errors that may pass."""
    from lora_hub_sdk.registry._source_errors import wait_asked

    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            asked = wait_asked(error)
            if not passes(error) or asked > _LONGEST_WAIT:
                raise
        time.sleep(max(wait, asked))
    return call()


def _offline_error(repo_id: str, revision: str | None) -> DownloadError:
    at = f" at revision {revision!r}" if revision else ""
    return DownloadError(
        f"{repo_id!r}{at} is not in the cache, and offline mode allows no request; pull it once while online",
        repo_id=repo_id,
        revision=revision,
    )


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
