"""huggingface_hub's cache on disk: what of a commit is there and whole, and what is known without a request.

The layout (``blobs``, ``refs``, ``snapshots``, ``.no_exist``) is the documented one, shared with every other
program on the machine. Notes that cannot be written, as in a cache mounted read-only, cost a later request and
nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GATE = "lora_hub.lock"


@dataclass(frozen=True, slots=True)
class HubCache:
    """The cache below ``root``; None for the configured place."""

    root: Path | None

    def snapshot(self, repo_id: str, sha: str) -> Path:
        """The folder of a commit, whether or not anything is in it."""
        return self._storage(repo_id) / "snapshots" / sha

    def find(
        self, repo_id: str, revision: str | None, *, needed: tuple[str, ...], asked: tuple[str, ...]
    ) -> Path | None:
        """The snapshot of a commit, or of the commit that a branch last pointed to.

        None unless every file ``needed`` is there and whole, and every file ``asked`` is there or known to be
        missing from the repository.
        """
        from huggingface_hub import try_to_load_from_cache

        known = {
            name: try_to_load_from_cache(repo_id, name, cache_dir=self.root, revision=revision)
            for name in (*needed, *asked)
        }
        # A path, None for "never asked for", or an object of its own for "the repository has no such file".
        files = [Path(path) for name in needed if isinstance(path := known[name], str)]
        if len(files) < len(needed) or None in known.values() or not all(is_whole(file) for file in files):
            return None
        return files[0].parent

    def note_branch(self, repo_id: str, revision: str, sha: str) -> None:
        """Keep what a branch or tag points to, for the time without a Hub."""
        refs = (self._storage(repo_id) / "refs").resolve()
        ref = (refs / revision).resolve()
        if revision == sha or not ref.is_relative_to(refs):
            return
        # Not beside it: whoever scans the cache takes any file there for a branch.
        draft = self.locks(repo_id) / f"{os.getpid()}-{threading.get_ident()}.draft"
        with contextlib.suppress(OSError):
            ref.parent.mkdir(parents=True, exist_ok=True)
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(sha)
            draft.replace(ref)

    def note_absence(self, repo_id: str, sha: str, name: str) -> None:
        """Keep that a commit has no file of this name."""
        note = self._storage(repo_id) / ".no_exist" / sha / name
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()

    @contextmanager
    def lease(self, repo_id: str, sha: str) -> Iterator[None]:
        """Keeps a repository from being collected while a commit is pulled and registered; one process has a commit's.

        The operating system ends the lease of a process that was killed.
        """
        from filelock import FileLock

        locks = self.locks(repo_id)
        with ExitStack() as held:
            # Nobody can collect anything from a cache that cannot be written.
            with contextlib.suppress(OSError):
                locks.mkdir(parents=True, exist_ok=True)
                (locks / _GATE).touch()
                held.enter_context(FileLock(locks / f"lora_hub-{sha}.lock", thread_local=False))
                # Whoever collects just now did not see this lease, and is waited for.
                with FileLock(locks / _GATE):
                    pass
            yield

    @contextmanager
    def collecting(self, repo_id: str) -> Iterator[bool]:
        """Holds up new leases on a repository; False where there are some, or where somebody else collects."""
        from filelock import FileLock, Timeout

        locks, is_free = self.locks(repo_id), True
        with ExitStack() as held:
            try:
                locks.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(locks / _GATE, timeout=0))
                for lease in locks.glob("lora_hub-*.lock"):
                    held.enter_context(FileLock(lease, timeout=0))
            except Timeout:
                is_free = False
                held.close()
            except OSError:  # a cache that cannot be written has no leases
                pass
            yield is_free

    def locks(self, repo_id: str) -> Path:
        """The folder of a repository's locks."""
        storage = self._storage(repo_id)
        return storage.parent / ".locks" / storage.name

    def _storage(self, repo_id: str) -> Path:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        root = Path(self.root or HF_HUB_CACHE).expanduser().resolve()
        return root / repo_folder_name(repo_id=repo_id, repo_type="model")


def is_whole(file: Path, size: int | None = None) -> bool:
    """Whether a cached file is what was stored there; ``size`` in bytes where the Hub named it.

    The client renames finished downloads without syncing them, so a crash of the machine can leave an empty
    file under a finished name. Large files lie under their sha256; the snapshot's link tells it.
    """
    found = file.stat().st_size
    if found != size and (size is not None or found == 0):
        return False
    name = Path(os.readlink(file)).name if file.is_symlink() else ""
    if not _SHA256.fullmatch(name):
        return True
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == name
