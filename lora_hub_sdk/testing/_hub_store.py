"""What a local Hub holds: repositories, their commits, and the tags that their cards declare."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# The real Hub's default .gitattributes sends these through LFS whatever their size.
_LFS_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf", ".model"})
_LFS_SIZE = 1 << 20
_CHUNK = 1 << 20
_SHORT_SHA = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a commit; ``content`` is the store's own copy.

    ``oid`` names what git holds: the file, or, for an LFS file, a pointer of ``pointer_size`` bytes (else 0).
    """

    content: Path
    size: int
    sha256: str
    oid: str
    pointer_size: int

    @property
    def lfs(self) -> bool:
        return self.pointer_size > 0

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True, slots=True)
class Commit:
    """One immutable revision."""

    sha: str
    files: Mapping[str, StoredFile]
    card: Mapping[str, Any]
    created_at: datetime

    def tags(self) -> list[str]:
        """The tags as the real Hub derives them from a card, base model relation included."""
        tags = [str(tag) for tag in _listed(self.card.get("tags"))]
        tags += [str(self.card[key]) for key in ("library_name", "pipeline_tag") if self.card.get(key)]
        tags += [f"license:{name}" for name in _listed(self.card.get("license"))]
        relation = self.card.get("base_model_relation")
        if relation is None and "adapter_config.json" in self.files:
            relation = "adapter"
        for base in _listed(self.card.get("base_model")):
            tags.append(f"base_model:{base}")
            if relation:
                tags.append(f"base_model:{relation}:{base}")
        return list(dict.fromkeys(tags))


@dataclass(slots=True)
class Repo:
    """A repository: commits that stay for good, branches that move. ``kind`` is "models" or "datasets"."""

    id: str
    kind: str = "models"
    private: bool = False
    gated: bool = False
    downloads: int = 0
    likes: int = 0
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit behind a branch, a full sha, or an unambiguous head of one."""
        sha = self.branches.get(revision, revision)
        if sha in self.commits:
            return self.commits[sha]
        if not _SHORT_SHA.fullmatch(revision):
            return None
        matches = [commit for known, commit in self.commits.items() if known.startswith(revision)]
        return matches[0] if len(matches) == 1 else None

    def commit(self, files: Mapping[str, StoredFile], branch: str) -> Commit:
        """Put ``files`` on top of ``branch``; the sha depends on nothing but content and parent."""
        parent = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{self.id}\0{parent}".encode())
        for path in sorted(files):
            digest.update(f"\0{path}\0{files[path].sha256}".encode())
        commit = Commit(digest.hexdigest(), dict(sorted(files.items())), _read_card(files), datetime.now(UTC))
        # New dictionaries: a request that is being answered goes on reading the old ones.
        self.commits = {**self.commits, commit.sha: commit}
        self.branches = {**self.branches, branch: commit.sha}
        return commit


def store_folder(folder: Path, blobs: Path) -> dict[str, StoredFile]:
    """Copy the regular files of ``folder`` into ``blobs``; later changes leave old revisions alone."""
    return {path.relative_to(folder).as_posix(): _store(path, blobs) for path in _regular_files(folder)}


def store_bytes(content: bytes, blobs: Path, suffix: str = "") -> StoredFile:
    """Keep content that comes from no folder; the suffix tells what git would send through LFS."""
    draft = blobs / f"draft{suffix}"
    draft.write_bytes(content)
    return _store(draft, blobs)


def _regular_files(folder: Path) -> Iterator[Path]:
    root = folder.resolve()
    for current, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".git"]
        for name in names:
            path = Path(current, name)
            # A link may rename a file of the same repository, never publish one from elsewhere on the disk.
            if path.is_file() and path.resolve().is_relative_to(root):
                yield path


def _store(path: Path, blobs: Path) -> StoredFile:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode())
    copy = blobs / "incoming"
    with path.open("rb") as source, copy.open("wb") as target:
        while chunk := source.read(_CHUNK):
            sha256.update(chunk)
            git.update(chunk)
            target.write(chunk)
    digest = sha256.hexdigest()
    copy.replace(blobs / digest)
    if path.suffix not in _LFS_SUFFIXES and size <= _LFS_SIZE:
        return StoredFile(blobs / digest, size, digest, git.hexdigest(), pointer_size=0)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    return StoredFile(blobs / digest, size, digest, oid, pointer_size=len(pointer))


def _read_card(files: Mapping[str, StoredFile]) -> Mapping[str, Any]:
    if "README.md" not in files:
        return {}
    from huggingface_hub import metadata_load

    # The real Hub, too, keeps a commit whose card cannot be read, or not be told in JSON.
    try:
        card = json.loads(json.dumps(metadata_load(files["README.md"].content), default=str))
    except Exception:
        return {}
    return card if isinstance(card, dict) else {}


def _listed(value: object) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
