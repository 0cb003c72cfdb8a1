"""Where Chroma runs: a server, or a folder that this process alone works on. Both turn its failures into our errors."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import urlsplit
from uuid import UUID

from lora_hub_sdk.errors import ConfigurationError, IndexDamagedError, IndexUnavailableError, RegistryError

_log: Final = logging.getLogger(__name__)

#: Seconds that a server may take for one answer; Chroma's own client would wait for ever.
_SERVER_TIMEOUT: Final = 60.0


class ChromaClient(Protocol):
    """Gives the connection, and says what its failures mean. Thread-safe.

    ``is_shared`` tells whether other processes may use the same Chroma.
    """

    is_shared: bool

    def connect(self) -> Any:
        """The chromadb client; another object after ``wipe``."""

    def failure(self, asked: str, cause: BaseException) -> RegistryError:
        """The error to raise where ``asked`` ended with ``cause``."""

    def wipe(self) -> bool:
        """Throw the files away, readable or not; False where they are not ours to delete."""

    def settle(self) -> None:
        """Note that a search went well."""

    def close(self) -> None:
        """Release the connection."""


class ChromaServer:
    """A Chroma server, which several processes may share.

    Args:
        url: "http://host:port" or "https://host:port"; the ports are 8000 and 443 where none is given.
        timeout: seconds for one answer.

    Raises:
        ConfigurationError: the URL is of another form.
    """

    is_shared = True

    def __init__(self, url: str, *, timeout: float = _SERVER_TIMEOUT) -> None:
        try:
            address = urlsplit(url)
            self._host, self._port = address.hostname or "", address.port
        except ValueError as error:
            raise ConfigurationError(f"index={url!r}: {error}; expected http://host:port of a Chroma server") from error
        extra = address.username or address.path.strip("/") or address.query or address.fragment
        if address.scheme not in ("http", "https") or not self._host or extra:
            raise ConfigurationError(f"index={url!r}: expected a folder, or http://host:port of a Chroma server")
        self._tls = address.scheme == "https"
        self._url, self._timeout = url, timeout
        self._lock = threading.Lock()
        self._client: Any = None

    def connect(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._open()
            return self._client

    def _open(self) -> Any:
        import chromadb
        import httpx
        from chromadb.config import Settings

        port = self._port or (443 if self._tls else 8000)
        host = f"[{self._host}]" if ":" in self._host else self._host
        # The client's constructor asks the server without a time limit, so we ask first.
        httpx.get(f"http{'s' * self._tls}://{host}:{port}/api/v2/heartbeat", timeout=self._timeout).raise_for_status()
        settings = Settings(anonymized_telemetry=False)
        client = chromadb.HttpClient(host=self._host, port=port, ssl=self._tls, settings=settings)
        session = getattr(getattr(client, "_server", None), "_session", None)
        if isinstance(session, httpx.Client):
            session.timeout = httpx.Timeout(self._timeout)
        return client

    def failure(self, asked: str, cause: BaseException) -> RegistryError:
        return IndexUnavailableError(
            f"{asked} at the Chroma server {self._url} ended with {_shown(cause)}; nothing is lost, SQL holds every "
            "vector: try again when it runs, or open the hub with another index"
        )

    def wipe(self) -> bool:
        return False

    def settle(self) -> None:
        pass

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


class ChromaFolder:
    """A folder of Chroma's embedded engine, held by a lock beside it, shared by all indexes of this process.

    A second process with the embedded engine would read stale without an error, so only one may open the folder. The
    kernel releases the lock of a process that dies.

    Damaged files can make Chroma's native code end the whole process. So a note lies beside the folder from opening it
    until a first search went well; where the note was left behind, the files are thrown away before they are opened.
    """

    is_shared = False
    _open_folders: ClassVar[dict[tuple[int, Path], ChromaFolder]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self._path = path
        self._process = os.getpid()
        self._users = 0
        self._lock = threading.Lock()
        self._client: Any = None
        self._settled = False
        self._note = path.with_name(f"{path.name}.opening")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file_lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0, thread_local=False)
        self._file_lock.acquire()

    @classmethod
    def take(cls, path: Path) -> ChromaFolder:
        """The folder, for one more user in this process, who has to ``close`` it.

        Raises:
            OSError: the lock is held by another process (``TimeoutError``), or cannot be made there.
        """
        path = path.expanduser().resolve()
        with cls._guard:
            # A forked child inherits this table, but neither Chroma's threads nor the right to the folder.
            folder = cls._open_folders.get((os.getpid(), path))
            if folder is None:
                folder = cls._open_folders[os.getpid(), path] = cls(path)
            folder._users += 1
            return folder

    def connect(self) -> Any:
        with self._lock:
            if self._process != os.getpid():
                raise IndexUnavailableError(
                    f"the vector index {self._path} was opened before this process forked; open the hub after the fork"
                )
            if not self._users:
                raise IndexUnavailableError(f"the vector index {self._path} was closed; open the hub again")
            if self._client is None:
                self._client = self._open()
            return self._client

    def _open(self) -> Any:
        import chromadb
        from chromadb.config import Settings

        if self._note.exists():
            _log.warning("the vector index %s ended its process the last time and is filled anew from SQL", self._path)
            self._delete_files()
        self._path.mkdir(parents=True, exist_ok=True)
        self._note.touch()
        self._settled = False
        try:
            return chromadb.PersistentClient(str(self._path), settings=Settings(anonymized_telemetry=False))
        except BaseException:
            self._forget_engine()
            raise

    def failure(self, asked: str, cause: BaseException) -> RegistryError:
        return IndexDamagedError(
            f"{asked} in the vector index {self._path} ended with {_shown(cause)}; it is a cache of SQL: "
            "`lora-hub reindex` writes it anew"
        )

    def wipe(self) -> bool:
        with self._lock:
            self._close_client()
            self._delete_files()
        return True

    def settle(self) -> None:
        if not self._settled:
            self._settled = True
            self._note.unlink(missing_ok=True)

    def close(self) -> None:
        with self._guard:
            self._users -= 1
            # A forked child must not release its parent's lock.
            if self._users or self._process != os.getpid():
                return
            with self._lock:
                self._close_client()
            self._note.unlink(missing_ok=True)
            self._open_folders.pop((self._process, self._path), None)
            self._file_lock.release()

    def _delete_files(self) -> None:
        # Only what Chroma writes: the folder may have been chosen by hand and hold more.
        for entry in self._path.iterdir() if self._path.is_dir() else ():
            if entry.name.startswith("chroma.sqlite3"):
                entry.unlink(missing_ok=True) if not entry.is_dir() else shutil.rmtree(entry)
            elif _is_uuid(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _close_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            # Closing flushes nothing that matters, and damaged files may make it fail or panic.
            with suppress(Exception):
                client.close()
        self._forget_engine()

    def _forget_engine(self) -> None:
        # chromadb keeps one engine a path, also one that failed to start, and gives it to the next client.
        from chromadb.api.shared_system_client import SharedSystemClient

        SharedSystemClient._identifier_to_system.pop(str(self._path), None)
        SharedSystemClient._identifier_to_refcount.pop(str(self._path), None)


def is_failure(error: BaseException) -> bool:
    """Whether storage failed, rather than the user interrupting: a panic of Chroma's Rust half is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _shown(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {str(cause)[:300]}"


def _is_uuid(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False
