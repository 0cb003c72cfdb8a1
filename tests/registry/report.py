"""What a process finds when it opens a registry: adapters, files, vectors, history, and the cache on disk."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE
from lora_hub_sdk.registry.admission import WEIGHTS_FILE
from lora_hub_sdk.registry.follower import Verification
from lora_hub_sdk.registry.gc import Freed
from lora_hub_sdk.types import Adapter, AdapterState, Event
from tests.registry.worker import Call


@dataclass(frozen=True, slots=True)
class Held:
    """One adapter as a process finds it. ``content`` is the sha256 of its two files, read from disk."""

    source: str
    revision: str
    state: AdapterState
    samples: tuple[str, ...]
    content: str
    folder: Path = field(compare=False)
    is_found: bool = field(default=True, compare=False)


@dataclass(frozen=True, slots=True)
class Report:
    """All that a freshly opened hub says of itself, and the database without it. ``problems`` should be empty."""

    adapters: dict[str, Held]
    events: list[Event]
    problems: list[str]


def content_of(folder: Path) -> str:
    """The sha256 of an adapter's weights and configuration as they lie on disk."""
    if not all((folder / name).is_file() for name in (WEIGHTS_FILE, CONFIG_FILE)):
        return f"missing from {folder}"
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes() + (folder / CONFIG_FILE).read_bytes()).hexdigest()


def look(hub: LoraHub, database: Path | None = None) -> Report:
    """What is there; ``database`` is read behind the hub's back where it is a SQLite file."""
    problems = [] if database is None else _sql_problems(database)
    verified = hub.verify()
    if not verified.agrees or verified.unembedded:
        problems.append(f"the index disagrees with SQL: {verified}")
    adapters = {adapter.name: _held(hub, adapter) for adapter in hub.list()}
    problems += [f"{name} is not found as it should be" for name, held in adapters.items() if not held.is_found]
    return Report(adapters, hub.events(limit=1_000_000)[::-1], problems)


def _held(hub: LoraHub, adapter: Adapter) -> Held:
    samples = hub.samples(adapter.name)
    top = hub.search(samples[0], k=1)
    found = [(hit.adapter.name, hit.adapter.revision) for hit in top] == [(adapter.name, adapter.revision)]
    return Held(
        adapter.repo_id,
        adapter.revision,
        adapter.state,
        samples,
        content_of(adapter.folder),
        adapter.folder,
        found == (adapter.state == "active"),
    )


def _sql_problems(database: Path) -> list[str]:
    """What no crash may leave behind, asked of SQLite itself."""
    questions = {
        "adapters without exactly one current revision": (
            "SELECT name, (SELECT count(*) FROM revisions r WHERE r.adapter_id = a.id AND r.current) AS n "
            "FROM adapters a WHERE n != 1"
        ),
        "adapters without exactly one vector": (
            "SELECT name, (SELECT count(*) FROM embeddings e WHERE e.adapter_id = a.id) AS n FROM adapters a "
            "WHERE n != 1"
        ),
        "adapters without their samples": (
            "SELECT name, (SELECT count(*) FROM samples s WHERE s.adapter_id = a.id) AS n FROM adapters a "
            "WHERE n != sample_count"
        ),
        "changes without exactly one event": "SELECT version, count(*) AS n FROM events GROUP BY version HAVING n != 1",
        "a version that is not that of the last event": (
            "SELECT value FROM meta WHERE key = 'version' "
            "AND CAST(value AS INTEGER) != (SELECT coalesce(max(version), 0) FROM events)"
        ),
        "versions without an event": "SELECT max(version), count(*) FROM events HAVING max(version) != count(*)",
        "broken references": "PRAGMA foreign_key_check",
        "damage": "SELECT * FROM pragma_integrity_check WHERE integrity_check != 'ok'",
    }
    connection = sqlite3.connect(database)
    try:
        answers = {what: connection.execute(question).fetchall() for what, question in questions.items()}
    finally:
        connection.close()
    return [f"{what}: {rows}" for what, rows in answers.items() if rows]


def replayed(events: Sequence[Event]) -> dict[str, tuple[str, AdapterState]]:
    """Name to (revision, state) as the events tell it; an event that cannot follow the one before fails."""
    told: dict[str, tuple[str, AdapterState]] = {}
    for event in events:
        before, what = told.get(event.name), f"{event} after {told.get(event.name)}"
        if event.action == "registered":
            assert before is None, what
            told[event.name] = (str(event.detail["revision"]), "active")
            continue
        assert before is not None, what
        revision, state = before
        if event.action == "removed":
            assert event.detail["revision"] == revision, what
            del told[event.name]
        elif event.action == "updated":
            assert event.detail["before"] == revision, what
            told[event.name] = (str(event.detail["revision"]), state)
        elif event.action in ("retired", "restored"):
            told[event.name] = (revision, "retired" if event.action == "retired" else "active")
        else:
            assert event.action in ("scored", "moved"), what
    return told


@dataclass(frozen=True, slots=True)
class Collected:
    """A collection: what it told beforehand, what it says it did, and the blobs' bytes on disk before and after."""

    told: Freed
    freed: Freed
    before: int
    after: int
    leftovers: list[str]


def collect(hub: LoraHub, cache: Path, repo_id: str = "*") -> Collected:
    """Collect, and list whatever is in the cache, of one repository or all, and belongs to no current revision."""
    told, before = hub.gc(dry_run=True), _blob_bytes(cache)
    freed, after = hub.gc(), _blob_bytes(cache)
    current = {adapter.folder for adapter in hub.list() if adapter.folder.is_relative_to(cache)}
    needed = {file.resolve() for folder in current for file in folder.rglob("*") if file.is_symlink()}
    storage = f"models--{repo_id.replace('/', '--')}"
    leftovers = [str(blob) for blob in cache.glob(f"{storage}/blobs/*") if blob.resolve() not in needed]
    leftovers += [str(folder) for folder in cache.glob(f"{storage}/snapshots/*") if folder not in current]
    commits = {folder.name for folder in current}
    refs = [file for file in cache.glob(f"{storage}/refs/**/*") if file.is_file()]
    leftovers += [str(ref) for ref in refs if ref.read_text() not in commits or ref.name.startswith(".")]
    leftovers += map(str, cache.glob(f".locks/{storage}/*.draft"))
    return Collected(told, freed, before, after, leftovers)


def _blob_bytes(cache: Path) -> int:
    return sum(blob.stat().st_size for blob in cache.glob("models--*/blobs/*"))


@dataclass(slots=True)
class Diary:
    """What one process did: changes that were confirmed in their order, refusals, and its view at the end."""

    changes: list[Call] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    races: list[tuple[str, int | None]] = field(default_factory=list)
    hits: list[list[tuple[str, str]]] = field(default_factory=list)
    verified: Verification | None = None
