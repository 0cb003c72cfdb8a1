"""A Hugging Face Hub on the loopback interface, over a folder of model repositories, and datasets beside them.

For tests and offline demonstrations: the real clients (huggingface_hub 1.x and 2.x, transformers, peft) talk
to it through ``endpoint=`` or ``HF_ENDPOINT``, and it fails on demand in the ways the real one does.
"""

from __future__ import annotations

import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.testing._hub_http import Handler, HubError, Server
from lora_hub_sdk.testing._hub_store import Repo, store_bytes, store_folder

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_REPO_ID = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)


@dataclass(slots=True)
class _Fault:
    """An error ``status``, or else a body that ends after ``keep`` bytes; ``left`` None: until healed."""

    repo_id: str | None
    path: str | None
    left: int | None
    status: int | None = None
    keep: int = 0
    retry_after: int | None = None


class LocalHub:
    """Serves model repositories by the Hub's protocol on 127.0.0.1, at a free port.

    Every ``<owner>/<name>`` folder below ``folder`` is published as branch "main" when the server starts, and
    more can be published at any time. Content is copied, so older revisions stay served whatever happens to
    the folders. ``token`` opens private and gated repositories, and lets clients push; with None nothing does. A
    listing comes in pages of at most ``page_size`` repositories. Where a repository is named to ``fail`` or
    ``truncate``, a dataset is "datasets/<owner>/<name>". Thread-safe.

    Inside ``with LocalHub(folder) as hub``, clients use it by ``endpoint=hub.url``. It differs from the real Hub in
    three ways: an unknown repository is a 404 also for callers without a token (there: 401), LFS files come from the
    same host instead of a CDN, and files of any size are pushed within the commit.
    """

    def __init__(self, folder: Path | None = None, *, token: str | None = None, page_size: int = 1000) -> None:
        self.token = token
        self.page_size = page_size
        self.connections: set[socket.socket] = set()
        self._folder = folder
        self._repos: dict[str, Repo] = {}
        self._faults: list[_Fault] = []
        self._requests: list[tuple[str, str]] = []
        self._actions: list[tuple[int, Callable[[], object]]] = []
        self._delay = 0.0
        self._closing = threading.Event()
        self._lock = threading.RLock()
        self._server: Server | None = None
        self._blobs = Path(tempfile.mkdtemp(prefix="local-hub-"))

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Publish the folder and listen.

        Raises:
            ConfigurationError: it was started before, or the folder does not exist.
        """
        if self._server is not None or self._closing.is_set():
            raise ConfigurationError("this LocalHub was started before; make a new one")
        if self._folder is not None:
            self._publish_all(self._folder)
        handler = type("_Handler", (Handler,), {"hub": self})
        self._server = Server(("127.0.0.1", 0), handler)
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), name="local-hub", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop listening, break every open connection, and drop the content. Closing twice is fine."""
        self._closing.set()
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        # Clients keep connections alive, and a closed Hub must not go on answering on them.
        for connection in tuple(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        shutil.rmtree(self._blobs, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The endpoint, without a slash at its end.

        Raises:
            ConfigurationError: the server does not run.
        """
        if self._server is None:
            raise ConfigurationError("this LocalHub does not run; use it in a with block or call start()")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[tuple[str, str]]:
        """Every request so far as (method, path without its query), in order of arrival; a copy."""
        with self._lock:
            return list(self._requests)

    # -- content ---------------------------------------------------------------------------------------------

    def publish(
        self,
        repo_id: str,
        folder: Path,
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        downloads: int = 0,
        likes: int = 0,
        hostile: Mapping[str, bytes] | None = None,
    ) -> str:
        """Commit the regular files of ``folder`` on top of ``branch`` and return the commit's 40 hex digits.

        The same content on the same parent gives the same digits. Links that leave the folder are left out.
        ``private``, ``gated``, ``downloads`` and ``likes`` hold for the whole repository from now on.

        Args:
            hostile: further files, listed and served under exactly these names, whatever a client makes of
                "../../x", "/etc/x" or content that looks like a link's.

        Raises:
            ConfigurationError: ``repo_id`` is no Hub id, or ``folder`` is no folder.
        """
        return self._publish(Repo(repo_id, "models", private, gated, downloads, likes), folder, branch, hostile)

    def publish_dataset(
        self,
        repo_id: str,
        folder: Path,
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        hostile: Mapping[str, bytes] | None = None,
    ) -> str:
        """As ``publish``, for a dataset repository."""
        return self._publish(Repo(repo_id, "datasets", private, gated), folder, branch, hostile)

    def _publish(self, asked: Repo, folder: Path, branch: str, hostile: Mapping[str, bytes] | None) -> str:
        if not _REPO_ID.fullmatch(asked.id):
            raise ConfigurationError(f"{asked.id!r} is no repository id; expected 'owner/name'")
        if not folder.is_dir():
            raise ConfigurationError(f"{str(folder)!r} cannot be published: it is no folder")
        with self._lock:
            repo = self._repos.setdefault(_key(asked.id, asked.kind), asked)
            repo.private, repo.gated = asked.private, asked.gated
            repo.downloads, repo.likes = asked.downloads, asked.likes
            files = store_folder(folder, self._blobs)
            files |= {name: store_bytes(content, self._blobs) for name, content in (hostile or {}).items()}
            return repo.commit(files, branch).sha

    def _publish_all(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigurationError(f"{str(folder)!r} holds no repositories: it is no folder")
        for repository in sorted(folder.glob("*/*")):
            repo_id = repository.relative_to(folder).as_posix()
            if repository.is_dir() and _REPO_ID.fullmatch(repo_id):
                self.publish(repo_id, repository)

    # -- faults ----------------------------------------------------------------------------------------------

    def fail(
        self,
        repo_id: str | None,
        *,
        status: int,
        path: str | None = None,
        times: int | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Answer requests for ``repo_id`` with ``status``: those for one file, or all of them.

        Args:
            repo_id: None for every request, listings included.
            times: how many requests fail before it works again; None: until ``heal``.
            retry_after: seconds, sent as Retry-After.
        """
        with self._lock:
            self._faults.append(_Fault(repo_id, path, times, status=status, retry_after=retry_after))

    def truncate(self, repo_id: str, path: str, keep: int, times: int | None = None) -> None:
        """Promise the whole of ``path``, break the connection after its first ``keep`` bytes.

        A client that resumes at ``keep`` gets nothing more, so the file stays incomplete until healed.
        """
        with self._lock:
            self._faults.append(_Fault(repo_id, path, times, keep=keep))

    def delay(self, seconds: float) -> None:
        """Let every answer wait for ``seconds`` from now on."""
        self._delay = seconds

    def after(self, requests: int, action: Callable[[], object]) -> None:
        """Run ``action`` once, when ``requests`` more have come in and before the next is answered.

        For what changes while a client works, such as a branch: ``hub.after(1, lambda: hub.publish(...))``.
        """
        with self._lock:
            self._actions.append((len(self._requests) + requests, action))

    def heal(self) -> None:
        """Take back every fault, delay, and action that has not run."""
        with self._lock:
            self._faults.clear()
            self._actions.clear()
            self._delay = 0.0

    # -- what the handler asks -------------------------------------------------------------------------------

    def record(self, method: str, path: str) -> None:
        with self._lock:
            count = len(self._requests)
            self._requests.append((method, path))
            due = [action for at, action in self._actions if at <= count]
            self._actions = [(at, action) for at, action in self._actions if at > count]
        for action in due:
            action()

    def pause(self) -> None:
        self._closing.wait(self._delay)

    def repos(self, kind: str) -> list[Repo]:
        with self._lock:
            found = [repo for repo in self._repos.values() if repo.kind == kind]
        return sorted(found, key=lambda repo: repo.id)

    def repo(self, repo_id: str, kind: str) -> Repo | None:
        with self._lock:
            return self._repos.get(_key(repo_id, kind))

    def create(self, repo_id: str, kind: str, *, private: bool) -> bool:
        """Make a repository with the one file that the real Hub puts there; False where it is already."""
        if kind not in ("models", "datasets") or not _REPO_ID.fullmatch(repo_id):
            raise HubError(400, f"{kind[:-1]} {repo_id!r} cannot be created")
        with self._lock:
            if _key(repo_id, kind) in self._repos:
                return False
            repo = Repo(repo_id, kind, private)
            repo.commit({".gitattributes": store_bytes(_ATTRIBUTES, self._blobs)}, "main")
            self._repos[_key(repo_id, kind)] = repo
        return True

    def change(self, repo: Repo, branch: str, changes: Mapping[str, bytes | None]) -> str:
        """Commit new contents of files, or None for those that go, on top of a branch; its 40 hex digits."""
        with self._lock:
            parent = repo.commits[repo.branches[branch]]
            files = {path: file for path, file in parent.files.items() if path not in changes}
            for path, content in changes.items():
                if content is not None:
                    files[path] = store_bytes(content, self._blobs, PurePosixPath(path).suffix)
            return repo.commit(files, branch).sha

    def meet_faults(self, repo_id: str | None = None, kind: str = "models", path: str | None = None) -> None:
        key = None if repo_id is None else _key(repo_id, kind)
        fault = self._take(key, path, truncating=False)
        if fault is not None and fault.status is not None:
            code = None
            if fault.status == 404:
                code = "RepoNotFound" if fault.path is None else "EntryNotFound"
            wait = {} if fault.retry_after is None else {"Retry_After": str(fault.retry_after)}
            raise HubError(fault.status, "Failed on demand", code, **wait)

    def truncation(self, repo_id: str, kind: str, path: str) -> int | None:
        fault = self._take(_key(repo_id, kind), path, truncating=True)
        return None if fault is None else fault.keep

    def _take(self, key: str | None, path: str | None, *, truncating: bool) -> _Fault | None:
        """The first fault that fits the request, used up by one."""
        with self._lock:
            for fault in self._faults:
                fits = fault.repo_id in (None, key) and fault.path in (None, path)
                if fits and (fault.status is None) == truncating and fault.left != 0:
                    if fault.left is not None:
                        fault.left -= 1
                    return fault
        return None


def _key(repo_id: str, kind: str) -> str:
    return repo_id if kind == "models" else f"{kind}/{repo_id}"
