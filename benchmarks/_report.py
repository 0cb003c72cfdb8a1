"""How a benchmark shows what it measured: JSON for programs, a table for people."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

Seconds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Report:
    """One run. ``systems`` and ``ratios`` keep the order in which they are to be shown.

    A ratio may hold what was ``asked`` of its median, as ">= 0.8", and whether that was ``reached``.
    """

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    systems: Mapping[str, Mapping[str, Any]]
    ratios: Mapping[str, Mapping[str, Any]]
    agree: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def as_json(self) -> str:
        """One line, so that the reports of several runs are JSON lines."""
        return json.dumps(asdict(self))

    def show(self) -> None:
        """Print tables."""
        from rich.console import Console

        console = Console()
        console.print(f"{self.machine}\n{self.settings}", markup=False, highlight=False)
        console.print(_table("system", self.systems))
        if self.ratios:
            console.print(_table("ratio", self.ratios))
        for name, found in self.agree.items():
            console.print(f"{name}: {found['rows_equal']} of {found['rows']} rows", markup=False)


@dataclass(frozen=True)
class Asked:
    """The bound that the median of a ratio has to keep: at least ``bound``, or at most."""

    bound: float
    most: bool = False

    def of(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """A ratio's figures, with what was asked of them."""
        middle = figures["median"]
        reached = middle <= self.bound if self.most else middle >= self.bound
        return {**figures, "asked": f"{'<=' if self.most else '>='} {self.bound:g}", "reached": reached}


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import peft
    import torch
    import transformers

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def throughput_ratio(seconds: Seconds, system: str, against: str) -> dict[str, float]:
    """How many times the throughput of ``against``, by rounds: both of a round met the same noise of the machine."""
    return spread([other / own for own, other in zip(seconds[system], seconds[against], strict=True)])


def _cpu() -> str:
    """The processor's name and the vector units that decide its speed in bfloat16, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{facts.get('model name', platform.processor())} ({' '.join(units)})"


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    cells = {name: {key: _cell(value) for key, value in row.items() if _is_shown(value)} for name, row in rows.items()}
    columns = list(dict.fromkeys(key for row in cells.values() for key in row))
    table = Table(title, *columns)
    for name, row in cells.items():
        table.add_row(name, *(row.get(key, "") for key in columns))
    return table


def _is_shown(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
