"""Taking out of huggingface_hub's cache what this registry put there and nothing refers to any more."""

from __future__ import annotations

import contextlib
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora_hub_sdk.registry._hub_cache import HubCache
from lora_hub_sdk.registry.queries import Pull
from lora_hub_sdk.registry.store import SqlStore


@dataclass(frozen=True, slots=True)
class Freed:
    """What a collection removed. ``commits`` are "owner/name@revision"; those in ``busy`` are being registered."""

    size_bytes: int
    commits: tuple[str, ...]
    busy: tuple[str, ...]


def collect(store: SqlStore, *, dry_run: bool = False) -> Freed:
    """Remove the files of commits that no adapter has as its current revision, and what broken downloads left.

    Only commits that this registry itself put into a cache on this machine are touched, and none that is being
    registered at the moment. Files that a commit shares with another one stay.

    Args:
        dry_run: only tell.
    """
    commits: list[str] = []
    busy: list[str] = []
    size = 0
    used = store.folders_in_use()
    with ExitStack() as leases:
        gone: list[Pull] = []
        for pull in store.pulls():
            if pull.folder in used or not _cache_root(pull).is_dir():
                continue
            if _is_free(pull, leases):
                gone.append(pull)
            else:
                busy.append(_label(pull))
        # Read again: somebody may have finished registering one of them before its lease was taken.
        used = store.folders_in_use()
        for root in sorted({_cache_root(pull) for pull in gone}):
            here = [pull for pull in gone if _cache_root(pull) == root and pull.folder not in used]
            size += _remove(root, here, dry_run)
            # What could not be deleted is tried again the next time.
            done = here if dry_run else [pull for pull in here if not Path(pull.folder).exists()]
            commits += map(_label, done)
            for pull in () if dry_run else done:
                store.forget_pull(pull.folder)
    return Freed(size, tuple(commits), tuple(busy))


def _cache_root(pull: Pull) -> Path:
    """From ``<root>/models--owner--name/snapshots/<commit>``."""
    return Path(pull.folder).parents[2]


def _is_free(pull: Pull, leases: ExitStack) -> bool:
    from filelock import Timeout

    try:
        leases.enter_context(HubCache(_cache_root(pull)).lease(pull.repo_id, pull.revision, wait=False))
    except Timeout:
        return False
    return True


def _remove(root: Path, pulls: list[Pull], dry_run: bool) -> int:
    """Remove commits from one cache; returns the bytes that this frees."""
    from huggingface_hub import scan_cache_dir

    # The library knows which files no other commit of a repository shares.
    strategy = scan_cache_dir(root).delete_revisions(*(pull.revision for pull in pulls))
    size = strategy.expected_freed_size
    if not dry_run:
        strategy.execute()
    for storage in {Path(pull.folder).parents[1] for pull in pulls}:
        size += _remove_partial(storage, dry_run)
    for pull in () if dry_run else pulls:
        # A download that was broken off early is no commit yet, as the library sees it.
        shutil.rmtree(pull.folder, ignore_errors=True)
        _remove_if_empty(Path(pull.folder).parents[1])
    return size


def _remove_partial(storage: Path, dry_run: bool) -> int:
    """What broken downloads left, unless somebody goes on with them at the moment."""
    from filelock import FileLock, Timeout

    size = 0
    for file in sorted(storage.glob("blobs/*.incomplete")):
        lock = storage.parent / ".locks" / storage.name / f"{file.name.partition('.')[0]}.lock"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=0):
                size += file.stat().st_size
                if not dry_run:
                    file.unlink()
        except Timeout:
            continue
    return size


def _remove_if_empty(storage: Path) -> None:
    if any(storage.glob("snapshots/*")) or any(storage.glob("blobs/*")):
        return
    with contextlib.suppress(OSError):
        shutil.rmtree(storage)


def _label(pull: Pull) -> str:
    return f"{pull.repo_id}@{pull.revision}"
