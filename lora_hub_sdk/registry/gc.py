"""Taking out of huggingface_hub's cache what this registry put there and nothing refers to any more."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_hub_sdk.registry._hub_cache import HubCache
from lora_hub_sdk.registry.queries import Pull
from lora_hub_sdk.registry.store import SqlStore

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

_TRIES: Final = 10


@dataclass(frozen=True, slots=True)
class Freed:
    """What a collection removed. ``commits`` are "owner/name@revision"; those in ``busy`` are being registered."""

    size_bytes: int
    commits: tuple[str, ...]
    busy: tuple[str, ...]


def collect(store: SqlStore, *, dry_run: bool = False) -> Freed:
    """Remove the files of commits that no adapter has as its current revision, and what broken downloads left.

    Only repositories that this registry itself put into a cache on this machine are touched, and none of which a commit
    is being registered at the moment. Files that a commit shares with another one stay.

    Args:
        dry_run: only tell.
    """
    commits: list[str] = []
    busy: list[str] = []
    size = 0
    used = store.folders_in_use()
    with ExitStack() as held:
        free: dict[Path, list[Pull]] = {}
        for storage, pulls in _by_storage(store.pulls()):
            unused = [pull for pull in pulls if pull.folder not in used]
            if not (unused or _unlinked(storage) or _drafts(storage)):
                continue
            if held.enter_context(HubCache(storage.parent).collecting(pulls[0].repo_id)):
                free[storage] = pulls
            else:
                busy += map(_label, unused)
        # Read again: somebody may have finished registering one of them before its repository was held.
        used = store.folders_in_use()
        cached = _scanned({storage.parent for storage in free})
        for storage, pulls in free.items():
            gone = [pull for pull in pulls if pull.folder not in used]
            size += _remove(storage, gone, cached, dry_run)
            # What could not be deleted is tried again the next time.
            done = gone if dry_run else [pull for pull in gone if not Path(pull.folder).exists()]
            commits += map(_label, done)
            for pull in () if dry_run else done:
                store.forget_pull(pull.folder)
    return Freed(size, tuple(commits), tuple(busy))


def _by_storage(pulls: Iterable[Pull]) -> list[tuple[Path, list[Pull]]]:
    """By the repository's folder, from ``<cache>/models--owner--name/snapshots/<commit>``; other machines' left out."""
    grouped: dict[Path, list[Pull]] = {}
    for pull in pulls:
        grouped.setdefault(Path(pull.folder).parents[1], []).append(pull)
    return [(storage, found) for storage, found in grouped.items() if storage.parent.is_dir()]


def _scanned(roots: Iterable[Path]) -> dict[Path, HFCacheInfo]:
    """What the library sees in each of some caches."""
    from huggingface_hub import scan_cache_dir

    def scan(root: Path) -> HFCacheInfo:
        for _ in range(_TRIES):
            # It looks at all repositories, and stumbles where somebody removes another one of them meanwhile.
            with contextlib.suppress(FileNotFoundError):
                return scan_cache_dir(root)
        return scan_cache_dir(root)

    return {root: scan(root) for root in roots}


def _remove(storage: Path, gone: list[Pull], cached: Mapping[Path, HFCacheInfo], dry_run: bool) -> int:
    """Remove commits and leftovers of one repository; returns the bytes that this frees.

    Killed at any point, it is done again by the next collection: a pull is forgotten last.
    """
    size = sum(_swept(storage, file, dry_run) for file in _unlinked(storage))
    # The library knows which files no other commit shares. Other repositories may have commits of the same name.
    seen = cached[storage.parent]
    only = replace(seen, repos=frozenset(repo for repo in seen.repos if repo.repo_path == storage))
    whole = {revision.commit_hash for repo in only.repos for revision in repo.revisions}
    commits = {pull.revision for pull in gone}
    strategy = only.delete_revisions(*sorted(whole & commits))
    size += strategy.expected_freed_size
    if dry_run:
        return size
    strategy.execute()
    for pull in gone:
        # A download that was broken off early is no commit yet, as the library sees it.
        shutil.rmtree(pull.folder, ignore_errors=True)
    for ref in storage.glob("refs/**/*"):
        if ref.is_file() and ref.read_text() in commits:
            ref.unlink()
    for draft in _drafts(storage):
        draft.unlink()
    _remove_if_empty(storage)
    return size


def _unlinked(storage: Path) -> list[Path]:
    """Files that no snapshot points to: what broken downloads left, and collections that were broken off."""
    try:
        links = [file for file in storage.glob("snapshots/**/*") if file.is_symlink()]
        linked = {os.path.abspath(file.parent / os.readlink(file)) for file in links}
    except FileNotFoundError:  # somebody else removes them
        return []
    return [file for file in sorted(storage.glob("blobs/*")) if os.path.abspath(file) not in linked]


def _drafts(storage: Path) -> list[Path]:
    """Branches that were never noted, as whoever was about to do so was killed."""
    return list((storage.parent / ".locks" / storage.name).glob("*.draft"))


def _swept(storage: Path, file: Path, dry_run: bool) -> int:
    """The bytes of a leftover, which is removed unless another program goes on with it at the moment."""
    from filelock import FileLock, Timeout

    lock = storage.parent / ".locks" / storage.name / f"{file.name.partition('.')[0]}.lock"
    try:
        with FileLock(lock, timeout=0):
            size = file.lstat().st_size
            if not dry_run:
                file.unlink()
            return size
    except (Timeout, OSError):
        return 0


def _remove_if_empty(storage: Path) -> None:
    if any(storage.glob("snapshots/*")) or any(storage.glob("blobs/*")):
        return
    with contextlib.suppress(OSError):
        shutil.rmtree(storage)


def _label(pull: Pull) -> str:
    return f"{pull.repo_id}@{pull.revision}"
