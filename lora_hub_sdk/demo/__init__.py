"""The embedded demo: small adapters with their samples and held-out rows, ready to publish, register and measure.

``lora_hub_sdk.demo.run`` shows them at work; ``lora_hub_sdk.demo.training`` made them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from lora_hub_sdk.demo.training.metrics import MetricName

ADAPTERS_FOLDER: Final = Path(__file__).parent / "adapters"
_OWNER: Final = "lora-hub-demo"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One prompt that the adapter was not trained on, and the answer that its task expects."""

    inputs: str
    targets: str


@dataclass(frozen=True, slots=True)
class DemoAdapter:
    """An adapter of the demo. ``samples`` represent it in the registry; ``metric`` scores answers to ``heldout``."""

    name: str
    repo_id: str
    folder: Path
    samples: tuple[str, ...]
    heldout: tuple[HeldOut, ...]
    metric: MetricName


def demo_adapters(folder: Path = ADAPTERS_FOLDER) -> tuple[DemoAdapter, ...]:
    """The demo adapters by name, read from their folders; a folder without held-out rows is no demo adapter."""
    return tuple(_read(rows.parent) for rows in sorted(folder.glob("*/heldout.jsonl")))


def _read(folder: Path) -> DemoAdapter:
    heldout = _rows(folder / "heldout.jsonl")
    return DemoAdapter(
        name=folder.name,
        repo_id=f"{_OWNER}/{folder.name}",
        folder=folder,
        samples=tuple(row["inputs"] for row in _rows(folder / "samples.jsonl")),
        heldout=tuple(HeldOut(row["inputs"], row["targets"]) for row in heldout),
        metric=heldout[0]["metric"],
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: JSON may hold U+2028 and the like as they are.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
