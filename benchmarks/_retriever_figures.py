"""The benchmark's tables as figures: curves with bands, and the likeness of the paper's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks._retriever_data import Material
from benchmarks._retriever_lab import Lab
from benchmarks._retriever_score import KS, Row, Table, value_of
from benchmarks._retriever_tables import FRACTION, trained_runs, untrained_run
from lora_hub_sdk.retriever.evaluation import evaluate_retriever
from lora_hub_sdk.retriever.figures import Curve, confusion_figure, curve_figure, similarity_figure

#: By part: the table, the column along the axis, its words, and whether each doubling takes the same width.
_CURVES = {
    "fraction": ("fraction", "share of the tasks trained on", False),
    "samples": ("samples", "samples of an adapter", True),
    "pool": ("adapters", "adapters in the pool", True),
    "arrivals": ("event", "arrivals and departures so far", False),
}


def draw(tables: Mapping[str, Sequence[Table]], lab: Lab, paper: Material, folder: Path) -> list[Path]:
    """Write PNG files, and the numbers of each beside it as JSON; returns them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    written: list[Path] = []
    for part, (column, label, log_x) in _CURVES.items():
        for table in tables.get(part, ())[:1]:
            for group, curves in _curves(table.rows, column).items():
                stem = folder / f"{part}-{group}"
                written += curve_figure(
                    curves, stem, title=table.title, x_label=label, y_label="questions, %", log_x=log_x
                )
    if "table2" in tables:
        runs = {"untrained": untrained_run(lab), "trained-40": trained_runs(lab, paper, FRACTION, [0])}
        for name, several in runs.items():
            for encoder, seen in several:
                found = evaluate_retriever(
                    encoder, paper.tasks, paper.clean, trained=seen, rerank=bool(seen), resamples=0
                )
                written += similarity_figure(found, folder / f"similarity-{name}")
                written += confusion_figure(found, folder / f"confusion-{name}")
    return written


def _curves(rows: Sequence[Row], column: str) -> dict[str, list[Curve]]:
    """Curves by group of questions: the top 1 and 3 of each encoder, with and without reranking."""
    lines: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in rows:
        words = ", reranked" if row.get("rerank") == "yes" else ""
        name = f"{row.get('encoder', '')}{words}".removeprefix(", ") or "cosine"
        lines.setdefault((row.get("questions of", "all"), name), []).append((float(row[column]), row))
    curves: dict[str, list[Curve]] = {}
    for (group, name), points in lines.items():
        for k in KS[:2]:
            cells = [row[f"top{k}"] for _, row in points]
            ends = [cell if isinstance(cell, Mapping) else {"low": cell, "high": cell} for cell in cells]
            curve = Curve(
                f"{name}, top {k}",
                [x for x, _ in points],
                [value_of(cell) for cell in cells],
                [end["low"] for end in ends],
                [end["high"] for end in ends],
            )
            curves.setdefault(group, []).append(curve)
    return curves
