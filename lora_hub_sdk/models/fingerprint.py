"""A short identity of the weights in a model folder."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

_SAMPLE_BYTES = 4096
_MAX_HEADER_BYTES = 100_000_000


def weights_fingerprint(folder: Path) -> str:
    """sha256 (64 hex digits) over every safetensors header and the first 4 KiB of each tensor under ``folder``.

    Hashing a 15 GB base at every start would cost half a minute; names, dtypes, shapes and a sample of every tensor
    tell models, and fine-tunes of one model, apart in milliseconds. It does not detect a bit flipped on purpose
    deep inside a tensor: content that is trusted is hashed in full where it is admitted.

    Raises:
        FileNotFoundError: no safetensors file there.
        ValueError: a file that is not safetensors.
    """
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file under {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        _update(digest, file)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"{file} is not a safetensors file")
        header = stream.read(size)
        digest.update(header)
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        for name in sorted(tensors):
            start, end = tensors[name]["data_offsets"]
            stream.seek(8 + size + start)
            digest.update(stream.read(min(end - start, _SAMPLE_BYTES)))
