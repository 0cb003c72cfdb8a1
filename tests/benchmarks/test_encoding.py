"""The benchmark of encoding on a handful of made-up tasks: its numbers are there and agree with each other."""

from __future__ import annotations

import pytest

from benchmarks._retriever_data import Material, material
from benchmarks.encoding import System, again, measure
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.settings import RetrieverSettings
from lora_hub_sdk.retriever.tasks import Task

WORDS = ("bridge", "winter", "lamp", "harvest", "clock")
STORY = "The weather was mild and nobody hurried. " * 20


@pytest.fixture(scope="module")
def asked_at_the_end() -> Material:
    """Only the end of a text tells its task."""
    wordings = {"translate": "Translate this to French: {}", "count": "How many letters are in {}? Give a number."}
    tasks = [Task(name, tuple(STORY + text.format(word) for word in WORDS[:3])) for name, text in wordings.items()]
    questions = [Question(STORY + text.format(word), name) for name, text in wordings.items() for word in WORDS[3:]]
    return material("made up", tasks, questions)


def test_what_reads_the_end_finds_what_stands_there(asked_at_the_end: Material) -> None:
    def system(tail: int) -> System:
        settings = RetrieverSettings(max_tokens=32, tail_tokens=tail)
        return System(SentenceEncoder(resolve_model("all-minilm-l6-v2"), settings=settings, cache_bytes=0))

    front, both = measure(asked_at_the_end, {"front": system(0), "both": system(16)}, rounds=1, questions=2)
    assert front.top1 is not None
    assert front.top1 < 100.0  # it sees the same text throughout
    assert both.top1 == 100.0
    assert both.top3 == 100.0
    assert front.same == 100.0
    assert front.speed["median"] == 1.0
    assert both.speed["min"] > 0
    assert all(found.alone is not None and found.alone < 1e-5 for found in (front, both))


def test_a_text_that_comes_again_is_compared_with_a_new_one(asked_at_the_end: Material) -> None:
    new, second = again(asked_at_the_end, rounds=2, questions=2)
    assert (new.system, second.system) == ("new", "again")
    assert new.speed["median"] == 1.0
    assert 0 < second.speed["min"] <= second.speed["median"] <= second.speed["max"]
