"""What agents and remote clients are told of adapters, hits, routes and errors: plain values, and no folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

from lora_hub_sdk.errors import (
    AdapterChangedError,
    AdapterNotFoundError,
    IndexDamagedError,
    IndexUnavailableError,
    LoraHubError,
    ModelNotFoundError,
    SchemaError,
    StorageError,
)
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.types import TRUST, Adapter, Hit, Route

#: Their own texts name databases, servers and folders as they stand; these can be read outside.
_INSIDE: Final[Mapping[type[LoraHubError], str]] = {
    StorageError: "the registry cannot be read or written at the moment; try again later",
    SchemaError: "the registry cannot be read or written at the moment; try again later",
    IndexUnavailableError: "adapters cannot be searched at the moment; try again later",
    IndexDamagedError: "adapters cannot be searched at the moment; try again later",
    AdapterChangedError: "an adapter's files are not those that were registered; its owner has to register it again",
    ModelNotFoundError: "the base model or the encoder cannot be loaded here",
}
_START: Final = r"(?:~?/|[A-Za-z]:[\\/])"
_QUOTED_PATH: Final = re.compile(rf"(['\"]){_START}[^'\"]*\1")
# Slashes inside of Hub ids, URLs and the like follow a letter, a colon or another slash.
_PATH: Final = re.compile(rf"(?<![\w.:/~-]){_START}[^\s'\",;()]*[^\s'\",;:.()]")
#: Samples that are shown of an adapter, those that stand in for a missing description, and the longest of them.
_EXAMPLES: Final = 5
_TELLING: Final = 2
_LONGEST_EXAMPLE: Final = 200


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """An adapter without its place on this machine; times in ISO 8601.

    ``repo_id`` is None where it was registered from a folder; a base model that is a folder goes by that folder's name.
    """
    return {
        "name": adapter.name,
        "description": adapter.description,
        "base_model": shown_name(adapter.base_model),
        "tags": list(adapter.tags),
        "license": adapter.license,
        "repo_id": None if os.path.isabs(adapter.repo_id) else adapter.repo_id,
        "revision": adapter.revision,
        "digest": adapter.digest,
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "size_bytes": adapter.size_bytes,
        "sample_count": adapter.sample_count,
        "trust": TRUST[adapter.origin],
        "state": adapter.state,
        "pinned": adapter.pinned,
        "created_at": adapter.created_at.isoformat(),
        "updated_at": adapter.updated_at.isoformat(),
    }


def hit_facts(hit: Hit) -> dict[str, Any]:
    """A hit of a search: its adapter's facts, the cosine, and the relevance where words ordered the hits."""
    return {"score": hit.score, "relevance": hit.relevance, **adapter_facts(hit.adapter)}


def purpose(hub: LoraHub, adapter: Adapter) -> str:
    """What an adapter is for: its description, or some of its kept samples; empty where it has neither."""
    if adapter.description:
        return adapter.description
    try:
        samples = hub.samples(adapter.name, namespace=adapter.namespace)[:_TELLING]
    except AdapterNotFoundError:  # removed since it was found
        return ""
    return f"For prompts like: {' | '.join(map(_shortened, samples))}" if samples else ""


def described(hub: LoraHub, name: str, namespace: str) -> dict[str, Any]:
    """Everything that may be told of one adapter: its facts, some of its kept samples, and its scores.

    Raises:
        AdapterNotFoundError: there is none of that name in the namespace.
    """
    samples = hub.samples(name, namespace=namespace)[:_EXAMPLES]
    return {
        **adapter_facts(hub.get(name, namespace=namespace)),
        "examples": [_shortened(text) for text in samples],
        "scores": [
            {"task": one.task, "metric": one.metric, "value": one.value, "current": one.current}
            for one in hub.scores(name, namespace=namespace)
        ],
    }


def route_facts(route: Route) -> dict[str, Any]:
    """``Route.as_dict`` without folders."""
    told = route.as_dict()
    members = [
        {**member, "repo_id": None if os.path.isabs(member["repo_id"]) else member["repo_id"]}
        for member in told["adapters"]
    ]
    return {"strategy": told["strategy"], "adapters": members}


def shown_name(base_model: str) -> str:
    """A base model's canonical name, or the last part of it where it is a folder."""
    return PurePath(base_model).name if os.path.isabs(base_model) else base_model


def error_text(error: LoraHubError) -> str:
    """What somebody outside may read of an error: paths lose all but their last part, troubles inside their details."""
    for kind, told in _INSIDE.items():
        if isinstance(error, kind):
            return told
    text = _QUOTED_PATH.sub(lambda found: f"{found[1]}{_last_part(found[0][1:-1])}{found[1]}", str(error))
    return _PATH.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or "a folder"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_EXAMPLE else f"{line[:_LONGEST_EXAMPLE]}..."
