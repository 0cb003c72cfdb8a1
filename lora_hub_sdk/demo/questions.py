"""Which held-out rows the demo shows and which it measures: drawn by a seed, disjoint, mixed over the tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from lora_hub_sdk.demo import DemoAdapter


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt of one task, with the answer that the task expects."""

    task: DemoAdapter
    prompt: str
    expected: str

    def score(self, answer: str) -> float:
        """The task's metric for an answer, in percent."""
        from lora_hub_sdk.demo.training.metrics import METRICS

        return METRICS[self.task.metric](answer, self.expected)


@dataclass(frozen=True, slots=True)
class Questions:
    """``shown`` are answered one by one before the reader's eyes, ``measured`` only counted."""

    shown: tuple[Question, ...]
    measured: tuple[Question, ...]


def draw_questions(adapters: Sequence[DemoAdapter], *, shown: int, per_task: int, seed: int) -> Questions:
    """Draw ``shown`` questions, evenly from all tasks, and ``per_task`` others of each task.

    A task with too few rows gives what it has, to the shown questions first.
    """
    rng = random.Random(seed)
    decks = [_deck(adapter, rng) for adapter in adapters]
    # Round by round over the tasks: every task is shown once before any is shown twice.
    rounds = chain.from_iterable(zip_longest(*decks))
    first = [question for question in rounds if question is not None][:shown]
    taken = {id(question) for question in first}
    rest = [[question for question in deck if id(question) not in taken][:per_task] for deck in decks]
    measured = list(chain.from_iterable(rest))
    rng.shuffle(first)
    rng.shuffle(measured)
    return Questions(tuple(first), tuple(measured))


def _deck(adapter: DemoAdapter, rng: random.Random) -> list[Question]:
    deck = [Question(adapter, row.inputs, row.targets) for row in adapter.heldout]
    rng.shuffle(deck)
    return deck
