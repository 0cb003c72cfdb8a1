"""Which base model a name or a folder stands for, and where its files are.

Adapters name their base by a Hub id, users often by a folder on their disk. A folder is taken for a Hub model only on
evidence: somebody said so, it lies in huggingface_hub's cache under that id, or its weights are that model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.models.fingerprint import weights_fingerprint
from lora_hub_sdk.models.names import canonical_name
from lora_hub_sdk.models.resolve import ResolvedModel, find_local, resolve_model

Reference = str | os.PathLike[str]


class BaseModels:
    """Base models by any name that is used for them. Thread-safe.

    Args:
        folders: Hub ids and the folders that hold these very models, for machines that cannot or shall not download.
        endpoint, token, offline: as for ``resolve_model``.

    Raises:
        ConfigurationError: a folder that does not exist.
    """

    def __init__(
        self,
        folders: Mapping[str, Reference] | None = None,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        offline: bool = False,
    ) -> None:
        self._folders = {canonical_name(name): Path(folder).expanduser() for name, folder in (folders or {}).items()}
        for name, folder in self._folders.items():
            if not folder.is_dir():
                raise ConfigurationError(f"base_folders[{name!r}]: there is no folder {str(folder)!r}")
        self._resolve = partial(resolve_model, endpoint=endpoint, token=token, offline=offline)
        self._same_weights = cache(_same_weights)

    def name(self, reference: Reference, known: Callable[[], Iterable[str]] = tuple) -> str:
        """The canonical name of a base model; a folder may turn out to be one of the ``known`` ones, asked for then."""
        name = canonical_name(reference)
        if not Path(name).is_dir():
            return name
        stated = [model for model, folder in self._folders.items() if str(folder.resolve()) == name]
        found = stated or [model for model in (_cache_owner(Path(name)),) if model]
        found = found or [model for model in sorted(known()) if model != name and self._same_weights(name, model)]
        return found[0] if found else name

    def resolve(self, reference: Reference, *, config_only: bool = False) -> ResolvedModel:
        """Its files, as ``resolve_model``; a folder that was named for a Hub id goes before the Hub."""
        folder = self._folders.get(canonical_name(reference))
        if folder is None:
            return self._resolve(reference, config_only=config_only)
        return replace(resolve_model(folder, config_only=config_only), id=canonical_name(reference))


def _cache_owner(folder: Path) -> str | None:
    """``owner/name`` of a folder ``.../models--owner--name/snapshots/<commit>``, as huggingface_hub lays it out."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def _same_weights(folder: str, model: str) -> bool:
    """Whether a folder holds the weights of a model that is on this machine already; nothing is downloaded."""
    other = find_local(model)
    if other is None:
        return False
    try:
        return weights_fingerprint(Path(folder)) == weights_fingerprint(other)
    except (OSError, ValueError):
        return False
