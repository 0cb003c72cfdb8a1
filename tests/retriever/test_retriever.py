"""The retriever on the paper's questions, where the evaluation material is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_hub_sdk.retriever.encoder import SentenceEncoder, mean_vector


@pytest.mark.slow
def test_top_k_on_the_papers_questions(shared: Path, encoder: SentenceEncoder) -> None:
    """Measured before for this encoder, untrained, with the instruction: top 1 / 3 about 68 / 88 %."""
    entries = json.loads((shared / "data/paper/adapters.json").read_text())
    adapters = np.stack([mean_vector(encoder.encode([row["inputs"] for row in entry["sample"]])) for entry in entries])
    names = [entry["model_name"] for entry in entries]
    questions = [json.loads(line) for line in (shared / "data/paper/questions.jsonl").read_text().splitlines()]
    ranks = np.argsort(-encoder.encode([row["inputs"] for row in questions]) @ adapters.T, axis=1)
    tasks = np.array([names.index(row["task"]) for row in questions])
    top = [float((ranks[:, :k] == tasks[:, None]).any(axis=1).mean()) for k in (1, 3)]
    assert top[0] > 0.65
    assert top[1] > 0.85
