"""A trained retriever on a Hub, where others use it by name."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.errors import ConfigurationError, RepoAccessError, SourceError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.settings import SETTINGS_FILE, read_settings
from lora_hub_sdk.retriever.training_report import REPORT_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

#: What a model consists of; whatever else lies in the folder may be private.
_SUFFIXES: Final = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})
_CARD: Final = "README.md"
_WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".onnx")


def push_retriever(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = False,
) -> str:
    """Publish a folder that ``RetrieverTrainer`` wrote, in one commit on "main".

    Afterwards ``LoraHub(encoder=repo_id)`` and plain sentence-transformers load it by name. The repository is made
    where there is none. One that holds a retriever already is brought to what the folder has, without files of the
    model that was there before; where nothing changed, there is no commit.

    Args:
        repo_id: "user/name".
        endpoint: a Hub other than https://huggingface.co.
        token: one that may write; by default that of `hf auth login` or HF_TOKEN.
        private: a new repository is private; by default as its owner has set on the Hub.

    Returns:
        The commit that has the folder's files, 40 hex digits.

    Raises:
        ConfigurationError: no folder of a finished training, ``repo_id`` is no "user/name", or the repository there is
            of something else, or public though ``private`` was asked for; nothing was pushed.
        ModelDamagedError: the folder lacks weights.
        RepoAccessError: no token, or one without the right to write there.
        DownloadError: the Hub could not be reached, or answered with an error.
    """
    check_repo_id(repo_id)
    files = _files(Path(folder))

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="lora_hub_sdk")
    try:
        found = _find(api, repo_id)
        if found is None:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            found = api.model_info(repo_id)
        present = [file.rfilename for file in found.siblings or ()]
        _require_fitting(repo_id, present, needs_private=private and not found.private)
        # Old weights beside new ones would be another encoder: every one of them is in the fingerprint.
        stale = [name for name in present if _is_of_model(name) and name not in files]
        # Not upload_folder, which may spread the files over several commits: a reader gets the old model or the new.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, file) for name, file in files.items()),
            ],
            commit_message="Upload a retriever of LoRA adapters",
        ).oid
    except ConfigurationError:
        raise
    except Exception as error:
        raise _told(error, repo_id, token) from error


def check_repo_id(repo_id: str) -> None:
    """Refuse what no Hub takes as a repository's name, before any work.

    Raises:
        ConfigurationError: not of the form "user/name".
    """
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    client: Any = utils  # its public functions are not marked as exported
    try:
        client.validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(f"repository {repo_id!r} cannot be pushed to: {error}") from error
    if "/" not in repo_id:
        raise ConfigurationError(f"repository {repo_id!r} names no owner; expected 'user/name'")


def _find(api: HfApi, repo_id: str) -> ModelInfo | None:
    """Asked before anything is made: many tokens may write to one repository and make none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def _files(folder: Path) -> dict[str, Path]:
    """What is pushed, by its name in the repository."""
    lacking = [name for name in (REPORT_FILE, SETTINGS_FILE, _CARD, "modules.json") if not (folder / name).is_file()]
    if lacking:
        raise ConfigurationError(
            f"{str(folder)!r} is no folder of a finished training, it lacks {', '.join(lacking)}; push one that "
            "`lora-hub train-retriever` has written to its end"
        )
    resolve_model(folder, offline=True)
    read_settings(folder)
    found = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: file for name, file in found.items() if name == _CARD or _is_of_model(name)}


def _is_of_model(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in _SUFFIXES and not any(part.startswith((".", "checkpoint")) for part in path.parts)


def _require_fitting(repo_id: str, present: list[str], *, needs_private: bool) -> None:
    if REPORT_FILE not in present and any(name.endswith(_WEIGHTS) for name in present):
        raise ConfigurationError(
            f"repository {repo_id!r} holds another model, which would be overwritten; push to another name"
        )
    if needs_private:
        raise ConfigurationError(
            f"repository {repo_id!r} is there already and public; make it private on its page, push to another name, "
            "or leave out private"
        )


def _told(error: Exception, repo_id: str, token: str | None) -> SourceError:
    from lora_hub_sdk.registry._source_errors import translate

    told = translate(error, repo_id=repo_id, revision=None, token=token, done="pushed to")
    if isinstance(told, RepoAccessError):
        return RepoAccessError(
            f"{repo_id!r} could not be pushed to: the Hub wants a token that may write there, and the one at hand may "
            "not, or there is none; pass token= or run `hf auth login`",
            repo_id=repo_id,
        )
    return told
