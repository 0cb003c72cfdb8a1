"""Which adapters for a base model a Hub has: found by their tag, believed only by their own configuration."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final
from urllib.parse import urlencode

from lora_hub_sdk.errors import AdmissionError, ConfigurationError, DownloadError, SourceError
from lora_hub_sdk.models.names import canonical_name, embedded
from lora_hub_sdk.registry.adapter_config import CONFIG_FILE, adapter_config_from_bytes
from lora_hub_sdk.registry.admission import Limits
from lora_hub_sdk.registry.source import HubSource

_SHA = re.compile(r"[0-9a-f]{40}")
_MAX_CONFIG: Final = 1_000_000
_MAX_PAGE: Final = 20_000_000
_PAGE: Final = 100
_THREADS: Final = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter on the Hub, as its configuration at one commit tells.

    ``revision`` is 40 hex digits, so that what is pulled is what was looked at. ``problem`` says why the adapter would
    be refused, None where nothing spoke against it: weights are not looked at. What the configuration does not tell
    is "" or None.
    """

    repo_id: str
    revision: str
    base_model: str
    peft_type: str | None
    rank: int | None
    alpha: float | None
    license: str | None
    tags: tuple[str, ...]
    downloads: int
    likes: int
    problem: str | None = None


def discover(
    base_model: str,
    query: str | None = None,
    limit: int = 20,
    *,
    include_refused: bool = False,
    max_scanned: int = 500,
    endpoint: str | None = None,
    token: str | None = None,
    timeout: float = 10.0,
    limits: Limits | None = None,
    offline: bool = False,
) -> list[Candidate]:
    """Adapters for a base model, the most downloaded first.

    The Hub's tags are what authors wrote. So each adapter's configuration is read at its commit, eight at a time, and
    has to name the same base model and hold nothing that this package cannot serve.

    Args:
        base_model: Hub id or short name.
        query: text that the repository's id contains.
        limit: how many adapters without a problem are looked for; scanning goes on past those with one.
        include_refused: give those with a problem too, in their places.
        max_scanned: how many repositories are looked at, at most.
        timeout: seconds that the Hub may stay silent.
        limits: an adapter of a larger rank has a problem.
        offline: ask nobody; then this raises.

    Raises:
        ConfigurationError: a base model without a Hub id, a limit below 1, or a token that cannot be sent.
        SourceError: the listing failed, or no configuration at all could be downloaded; never quotes the token.
    """
    base = canonical_name(base_model)
    if not base_model.strip() or os.path.isabs(base):
        raise ConfigurationError(f"base_model is {base_model!r}; the Hub is searched by a Hub id like 'owner/name'")
    if limit < 1 or max_scanned < 1:
        raise ConfigurationError(f"limit={limit} and max_scanned={max_scanned} must both be 1 or more")
    source = HubSource(endpoint=endpoint, token=token, timeout=timeout, offline=offline)
    look = _Look(source, base, limits or Limits())
    listed = islice(_listed(source, base, query), max_scanned)
    found: list[Candidate] = []
    failures: list[SourceError] = []
    with ThreadPoolExecutor(_THREADS, "discover") as pool:
        while sum(not seen.problem for seen in found) < limit and (batch := list(islice(listed, _THREADS))):
            for seen, failure in pool.map(look.at, batch):
                found.append(seen)
                failures += [failure] if failure else []
    if found and len(failures) == len(found) and isinstance(failures[-1], DownloadError):
        # An empty list would say that there are none.
        raise failures[-1]
    return _first(found, limit, include_refused)


def _first(found: Sequence[Candidate], limit: int, include_refused: bool) -> list[Candidate]:
    """Up to ``limit`` good ones; of the others those that stand before the last of these."""
    good = [place for place, seen in enumerate(found) if not seen.problem][:limit]
    stop = good[-1] + 1 if len(good) == limit else len(found)
    return [seen for seen in found[:stop] if include_refused or not seen.problem]


def _listed(source: HubSource, base: str, query: str | None) -> Iterator[Mapping[str, Any]]:
    """What the Hub lists, page by page, asked as HfApi.list_models asks."""
    wanted: dict[str, Any] = {
        "filter": [f"base_model:adapter:{base}"],
        "sort": "downloads",
        "limit": _PAGE,
        "expand": ["sha", "tags", "downloads", "likes"],
    }
    if query:
        wanted["search"] = [query]
    asked = f"the adapters of {base}"
    following: str | None = urlencode(wanted, doseq=True)
    while following:
        answer = source.get("/api/models", asked=asked, query=following, max_bytes=_MAX_PAGE)
        try:
            page = json.loads(answer.body)
            entries = [entry for entry in page if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        except (ValueError, TypeError, RecursionError) as error:
            raise DownloadError(f"{asked}: the endpoint sent no listing; check it", repo_id=asked) from error
        yield from entries
        # Pages of nothing could go on for ever; of the others, ``max_scanned`` is the end.
        following = answer.next_query if entries else None


@dataclass(frozen=True, slots=True)
class _Look:
    """One look at a listed repository. Thread-safe."""

    source: HubSource
    base: str
    limits: Limits

    def at(self, entry: Mapping[str, Any]) -> tuple[Candidate, SourceError | None]:
        repo_id, sha = entry["id"], entry.get("sha")
        tags = tuple(tag for tag in entry.get("tags") or () if isinstance(tag, str))
        seen = Candidate(
            repo_id=repo_id,
            revision=sha if isinstance(sha, str) and _SHA.fullmatch(sha) else "",
            base_model="",
            peft_type=None,
            rank=None,
            alpha=None,
            license=", ".join(tag.partition(":")[2] for tag in tags if tag.startswith("license:")) or None,
            tags=tags,
            downloads=_count(entry.get("downloads")),
            likes=_count(entry.get("likes")),
        )
        if not seen.revision:
            return replace(seen, problem="the endpoint names no commit for it"), None
        try:
            content = self.source.fetch(repo_id, CONFIG_FILE, seen.revision, max_bytes=_MAX_CONFIG)
        except SourceError as error:
            return replace(seen, problem=str(error)), error
        except AdmissionError as error:
            return replace(seen, problem=error.problem), None
        return self._judged(seen, content), None

    def _judged(self, seen: Candidate, content: bytes) -> Candidate:
        seen = _told(seen, content)
        try:
            config = adapter_config_from_bytes(content, seen.repo_id)
        except AdmissionError as error:
            return replace(seen, problem=error.problem)
        rank = max((config.r, *config.rank_pattern.values()))
        problem = None
        if seen.base_model != self.base:
            problem = f"its {CONFIG_FILE} names the base model {config.base_model!r}, not {self.base!r}"
        elif rank > self.limits.max_rank:
            problem = f"rank={rank} is above the limit of {self.limits.max_rank}"
        return replace(seen, rank=rank, alpha=config.alpha, problem=problem)


def _told(seen: Candidate, content: bytes) -> Candidate:
    """The adapter's kind and base model, told also where the rest is refused."""
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError):
        return seen
    values = raw if isinstance(raw, dict) else {}
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    return replace(
        seen,
        peft_type=kind if isinstance(kind, str) else None,
        base_model=_hub_name(base) if isinstance(base, str) else "",
    )


def _hub_name(name: str) -> str:
    """As ``canonical_name``, but a stranger's name is never looked up on this disk."""
    known = embedded(name)
    return known.hub_id if known else name


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
