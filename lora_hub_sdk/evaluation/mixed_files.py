"""Rows of question files as they are written: JSON lines, JSON or Parquet, on this machine or in a Hub dataset."""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError
from lora_hub_sdk.retriever.samples import read_samples

#: Forms of files, the first that a dataset has is read: many offer the same rows in several.
_FORMS: Final = (".jsonl", ".json", ".parquet")
_LARGEST: Final = 64 << 20
#: Files that describe a dataset instead of being it.
_NO_DATA: Final = re.compile(r"(dataset_?infos?|state|config|metadata)\.json", re.IGNORECASE)


def local_rows(source: str | os.PathLike[str]) -> Iterator[tuple[str, object]]:
    """The rows of a file, of all *.jsonl in a folder, or of a glob, each with its place ("questions.jsonl, row 3").

    Raises:
        ConfigurationError: there is no such file, or one that cannot be read.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        files = sorted(Path(name).glob("*.jsonl"))
    elif os.path.exists(name):
        files = [Path(name)]
    else:
        files = [Path(found) for found in sorted(glob.glob(name, recursive=True))]
    if not files:
        raise ConfigurationError(f"questions {name!r}: found no file; expected a file, a folder of *.jsonl, or a glob")
    for file in files:
        yield from _rows(file, file.name)


def hub_rows(
    repo_id: str, split: str, *, revision: str | None, endpoint: str | None, token: str | None, cache_dir: Path | None
) -> Iterator[tuple[str, object]]:
    """As ``local_rows``, of the files of a dataset whose names tell the split: "test.jsonl", "data/test-00000-of-…".

    All of them are of the one commit that the revision names now.

    Raises:
        SourceError: the dataset cannot be had.
        ConfigurationError: no file of that split, or one that cannot be read.
    """
    import huggingface_hub

    from lora_hub_sdk.registry._source_errors import translate

    try:
        api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
        found = api.dataset_info(repo_id, revision=revision)
        names = _of_split([sibling.rfilename for sibling in found.siblings or ()], split)
        files = [
            huggingface_hub.hf_hub_download(
                repo_id,
                name,
                repo_type="dataset",
                revision=found.sha,
                endpoint=endpoint,
                token=token,
                cache_dir=cache_dir,
            )
            for name in names
        ]
    except Exception as error:
        raise translate(error, repo_id=repo_id, revision=revision, token=token) from error
    if not files:
        raise ConfigurationError(
            f"dataset {repo_id!r} has no {', '.join(_FORMS)} file of the split {split!r}; give another split, or "
            "download its files and name them"
        )
    for name, file in zip(names, files, strict=True):
        yield from _rows(Path(file), f"{repo_id}/{name}")


def _of_split(paths: list[str], split: str) -> list[str]:
    """By the file's own name where any tells the split, else by its folders'."""
    told = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", re.IGNORECASE)
    files = [PurePosixPath(path) for path in paths if not _NO_DATA.fullmatch(PurePosixPath(path).name)]
    for named in (
        [file for file in files if told.search(file.name)],
        [file for file in files if split in file.parts[:-1]],
    ):
        for form in _FORMS:
            if found := [file.as_posix() for file in named if file.suffix.lower() == form]:
                return sorted(found)
    return []


def _rows(file: Path, name: str) -> Iterator[tuple[str, object]]:
    form = file.suffix.lower()
    rows: list[Any]
    if form == ".parquet":
        rows = _parquet(file, name)
    elif form == ".json":
        rows = _json(file, name)
    else:
        rows = read_samples(file)
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


def _json(file: Path, name: str) -> list[Any]:
    """A list, an object that holds one list, or, as many such files are, JSON lines."""
    try:
        size = file.stat().st_size
        value = json.loads(file.read_text(encoding="utf-8-sig")) if size <= _LARGEST else None
    except json.JSONDecodeError:
        return list(read_samples(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"questions {name!r} cannot be read: {type(error).__name__}") from None
    if isinstance(value, Mapping):
        lists = [one for one in value.values() if isinstance(one, list)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise ConfigurationError(f"questions {name!r}: expected a list of objects of at most {_LARGEST} bytes")
    return value


def _parquet(file: Path, name: str) -> list[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("Parquet", "evaluation") from error
    try:
        rows: list[Any] = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these types
        raise ConfigurationError(f"questions {name!r} is no Parquet file: {type(error).__name__}") from None
    return rows
