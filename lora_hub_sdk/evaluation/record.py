"""What a run of the benchmark stands on and how it went: ``run.json``, which tells whether a folder can go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lora_hub_sdk.composition.tensor_file import write_whole
from lora_hub_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from lora_hub_sdk.evaluation.ground import Ground
    from lora_hub_sdk.evaluation.mixed_set import MixedSet

RECORD_FILE: Final = "run.json"


@dataclass(slots=True)
class SystemRecord:
    """One system of a run.

    Attributes:
        listed: whether it is one of the table's, and not of a figure's alone.
        learns: whether it was taught by rows of the tasks.
        prepare_s: seconds of learning, of all runs together.
        route_s: seconds of finding its routes, likewise.
    """

    listed: bool = True
    learns: bool = False
    prepare_s: float = 0.0
    route_s: float = 0.0


@dataclass(slots=True)
class RunRecord:
    """One folder of answers.

    Attributes:
        about: what all of its answers stand on; a run that stands on something else is refused.
        training: digest of the rows that systems learned from; empty as long as nobody has learned.
        adapters: how many adapters the pool has.
        own: by task the name of its own adapter.
        systems: those that were asked, by name.
        told: what the caller said of the run, for its report.
        left_out: why others could not run, by name.
        answer_s: seconds of answering, of all runs together; systems share batches, so it is of all of them.
        answered: how many answers were generated, each equal route once.
        tokens: how many these have.
    """

    about: dict[str, str]
    training: str = ""
    adapters: int = 0
    own: dict[str, str] = field(default_factory=dict)
    systems: dict[str, SystemRecord] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    answer_s: float = 0.0
    answered: int = 0
    tokens: int = 0

    @property
    def listed(self) -> tuple[str, ...]:
        """The table's systems."""
        return tuple(name for name, one in self.systems.items() if one.listed)

    def as_dict(self) -> dict[str, Any]:
        """As ``run.json`` holds it."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Keep it; what was there before is replaced as a whole."""
        write_whole(folder / RECORD_FILE, (json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RunRecord:
        """What ``write`` kept.

        Raises:
            ConfigurationError: there is none, or one that cannot be read.
        """
        path = Path(folder) / RECORD_FILE
        try:
            told = json.loads(path.read_bytes())
            systems = {name: SystemRecord(**one) for name, one in told.pop("systems").items()}
            return cls(**told, systems=systems)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(
                f"{str(path)!r} is no record of a run: {error}; `lora-hub bench mixed --output` makes one"
            ) from error

    def check_same(self, about: Mapping[str, str], training: str, folder: Path) -> None:
        """Refuse to go on with a folder whose answers stand on something else.

        Raises:
            ConfigurationError: names what differs.
        """
        both = {**self.about, "training rows": self.training} if training and self.training else self.about
        now = {**about, "training rows": training}
        differing = [
            f"{name} {_short(was)}, not {_short(now.get(name, ''))}"
            for name, was in both.items()
            if now.get(name) != was
        ]
        if differing:
            raise ConfigurationError(
                f"output={str(folder)!r} has answers of another run: its {'; its '.join(differing)}; give another "
                "folder, or the same run"
            )


def about_run(ground: Ground, questions: MixedSet, max_new_tokens: Mapping[str, int]) -> dict[str, str]:
    """What answers stand on beside their routes. The base model is loaded where it is not."""
    base = ground.hub.engine(ground.base_model, ground.settings).base
    pool = ground.pool().values()
    template = ground.template
    return {
        "questions": questions.digest,
        "base model": next((one.base_model for one in pool), base.id),
        "number format": str(base.dtype).removeprefix("torch."),
        "quantization": (ground.settings and ground.settings.quantization) or "none",
        "device": base.device.type,
        "template": template if isinstance(template, str) else getattr(template, "__qualname__", str(template)),
        "longest answers": json.dumps(dict(sorted(max_new_tokens.items()))),
        "namespace": ground.namespace,
        "pool": _digest(
            f"{one.name} {one.digest} {_digest(ground.hub.samples(one.name, namespace=one.namespace))}" for one in pool
        ),
        "encoder": ground.hub.encoder.fingerprint,
        "tasks' own adapters": _digest(f"{task} {name}" for task, name in sorted(ground.own.items())),
    }


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def _short(value: str) -> str:
    return value[:12] if len(value) == 64 else value or "none"
