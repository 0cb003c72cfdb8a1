"""Texts to represent an adapter by where its author gave none: examples in its card, or rows of the data it names."""

from __future__ import annotations

import csv
import importlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import quote

from lora_hub_sdk.errors import AdmissionError, SourceError
from lora_hub_sdk.registry._card import read_card
from lora_hub_sdk.registry.source import CARD, HubSource

_log = logging.getLogger(__name__)

#: Where a row's prompt stands: the first of these with text. A row with an "instruction" is read as Alpaca's: the
#: instruction and, below it, the "input". A conversation gives its first user turn.
PROMPT_COLUMNS: Final = ("inputs", "input", "prompt", "question", "text", "messages", "conversations", "conversation")
_INSTRUCTION: Final = "instruction"
_USERS: Final = frozenset({"user", "human"})

_WANTED: Final = 20
_MAX_FILE: Final = 20_000_000
_MAX_LISTING: Final = 8 << 20
_MAX_ROWS: Final = 100_000
_MAX_DATASETS: Final = 3
_MAX_FILES: Final = 3
_MAX_TURNS: Final = 50
_MAX_CHARACTERS: Final = 4000
#: No name that a path could climb with.
_DATASET: Final = re.compile(r"(?:[\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}", re.ASCII)
#: Files that describe a dataset instead of being it.
_NO_DATA: Final = re.compile(r"(dataset_?infos?|state|config|metadata|tokenizer\w*|vocab|index)\.json", re.IGNORECASE)
_NOT_FOR_TRAINING: Final = re.compile(
    r"(?<![a-z])(test|val|valid|validation|dev|eval|evaluation)(?![a-z])", re.IGNORECASE
)
_TRAINING: Final = re.compile(r"(?<![a-z])train", re.IGNORECASE)

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CardSamples:
    """Up to 20 texts, none where nothing was found; ``source`` says where they stand, "" without texts."""

    texts: tuple[str, ...] = ()
    source: str = ""


def card_samples(
    folder: Path,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    timeout: float = 10.0,
    offline: bool = False,
    owner: str | None = None,
) -> CardSamples:
    """Prompts that an adapter's card shows or points to.

    The card's ``widget`` examples come first. Where it has none, the datasets that it names are asked for on the Hub:
    of at most three, the first readable training file of up to 20 MB (JSON lines, JSON, CSV, TSV, or Parquet where
    pyarrow is installed), about 20 rows spread over it. Nothing is executed, nothing written to disk, and no failure
    is more than a line in the log: an adapter can always be registered with samples of one's own.

    Args:
        folder: the adapter's folder; its README.md is the card.
        offline: use the card alone.
        owner: whose adapter this is on the Hub; None for a local folder. Datasets of anybody else are asked for without
            a token: a stranger's card must not draw on data that only the caller may read.
    """
    card = read_card(folder / CARD)
    texts = _kept(_prompt_of(item) for item in card.widget)
    if texts:
        return CardSamples(texts, "the card's widget")
    if offline:
        return CardSamples()
    for dataset in card.datasets[:_MAX_DATASETS]:
        trusted = owner is None or dataset.startswith(f"{owner}/")
        source = HubSource(endpoint=endpoint, token=token if trusted else False, timeout=timeout)
        # A stranger's bytes go through several parsers, and none of them may cost the adapter.
        try:
            found = _from_dataset(source, dataset)
        except Exception as error:
            told = str(error) if isinstance(error, SourceError | AdmissionError) else type(error).__name__
            _log.info("dataset %r, named in the card in %s, gives no samples: %s", dataset, folder, told)
            continue
        if found.texts:
            return found
        _log.info("dataset %r, named in the card in %s, has no file that samples could be read from", dataset, folder)
    return CardSamples()


# -- a dataset's files -----------------------------------------------------------------------------------------


def _from_dataset(source: HubSource, dataset: str) -> CardSamples:
    if not _DATASET.fullmatch(dataset):
        return CardSamples()
    place = f"/api/datasets/{quote(dataset)}/revision/main"
    listed = json.loads(source.get(place, asked=dataset, query="blobs=true", max_bytes=_MAX_LISTING).body)
    sha = str(listed["sha"])
    for path in _training_files(listed.get("siblings") or [])[:_MAX_FILES]:
        try:
            content = source.fetch(dataset, path, sha, max_bytes=_MAX_FILE, kind="datasets")
            texts = _kept(map(_prompt_of, _READERS[_form(path)](content)))
        except (AdmissionError, ValueError, csv.Error, RecursionError, _UnreadableError) as error:
            _log.info("%s of dataset %r is passed over: %s", path, dataset, error)
            continue
        if texts:
            return CardSamples(texts, f"dataset {dataset} at {sha[:12]}, {path}")
    return CardSamples()


def _training_files(listing: Sequence[Any]) -> list[str]:
    """Names of files to try, the likeliest first: named after training, then simpler forms, then the order of names."""
    found = []
    for entry in listing:
        path, size = entry.get("rfilename"), entry.get("size")
        if not isinstance(path, str) or _form(path) not in _READERS or _NO_DATA.fullmatch(PurePosixPath(path).name):
            continue
        if isinstance(size, int) and not 0 < size <= _MAX_FILE:
            continue
        if _TRAINING.search(path):
            found.append((0, list(_READERS).index(_form(path)), path))
        elif not _NOT_FOR_TRAINING.search(path):
            found.append((1, list(_READERS).index(_form(path)), path))
    return [path for _, _, path in sorted(found)]


def _form(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


# -- a file's rows ---------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """A file that cannot be read here."""


def _json_lines(content: bytes) -> list[Row]:
    # Not splitlines: JSON may hold U+2028 and the like as they are.
    lines = [line for line in content.split(b"\n") if line.strip()]
    return _rows(json.loads(line) for line in _spread(lines))


def _json(content: bytes) -> list[Row]:
    try:
        value = json.loads(content)
    except json.JSONDecodeError:
        return _json_lines(content)
    if isinstance(value, dict):
        value = next((value[key] for key in ("train", "data", "rows", "examples") if key in value), [])
    return _rows(_spread(value)) if isinstance(value, list) else []


def _csv(content: bytes, delimiter: str = ",") -> list[Row]:
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter)
    return _spread(list(islice(reader, _MAX_ROWS)))


def _parquet(content: bytes) -> list[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise _UnreadableError("Parquet needs pyarrow; pip install pyarrow, or give samples of your own") from error
    file = parquet.ParquetFile(io.BytesIO(content))
    columns = [name for name in file.schema_arrow.names if name.lower() in {_INSTRUCTION, *PROMPT_COLUMNS}]
    rows: list[Row] = []
    # Small batches of the wanted columns: a few packed bytes can stand for gigabytes.
    for batch in file.iter_batches(batch_size=256, columns=columns):
        if batch.nbytes > _MAX_FILE:
            raise _UnreadableError("its rows are too large")
        rows += batch.to_pylist()
        if len(rows) >= _MAX_ROWS // 10:
            break
    return _spread(rows)


_READERS: Final[Mapping[str, Callable[[bytes], list[Row]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}


def _rows(values: Iterable[object]) -> list[Row]:
    return [value for value in values if isinstance(value, dict)]


def _spread(items: list[Any]) -> list[Any]:
    """Up to 20 items at equal distances: data is often sorted by kind."""
    count = min(_WANTED, len(items))
    return [items[place * len(items) // count] for place in range(count)]


# -- a row's prompt --------------------------------------------------------------------------------------------


def _prompt_of(row: object) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        return ""
    # A name of no type that a table should have, such as csv's None for surplus cells, is passed over.
    columns = {name.lower(): value for name, value in row.items() if isinstance(name, str)}
    if isinstance(instruction := columns.get(_INSTRUCTION), str) and instruction.strip():
        return f"{instruction}\n{_said(columns.get('input'))}"
    return next((text for name in PROMPT_COLUMNS if (text := _said(columns.get(name))).strip()), "")


def _said(value: object) -> str:
    """A text as it is; of a conversation, what the user says first."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return ""
    for turn in value[:_MAX_TURNS]:
        if isinstance(turn, Mapping) and (turn.get("role") or turn.get("from")) in _USERS:
            content = turn.get("content") or turn.get("value")
            return content if isinstance(content, str) else ""
    return ""


def _kept(prompts: Iterable[str]) -> tuple[str, ...]:
    cut = (prompt.strip()[:_MAX_CHARACTERS].strip() for prompt in prompts)
    return tuple(islice(dict.fromkeys(text for text in cut if text), _WANTED))
