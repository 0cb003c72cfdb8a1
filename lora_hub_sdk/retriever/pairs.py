"""Which texts meet in which training step: pairs of one task each, so that every other task is a negative. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_hub_sdk.errors import SamplesError
from lora_hub_sdk.retriever.samples import folded, storable
from lora_hub_sdk.retriever.tasks import Task


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts of one task. They are the same text where a task has one only: dropout tells the two apart."""

    task: str
    anchor: str
    positive: str


def plan_steps(
    tasks: Sequence[Task],
    *,
    steps: int,
    negatives: int,
    near: Mapping[str, Sequence[str]],
    hard: float,
    seed: int,
) -> list[list[Pair]]:
    """The pairs of each training step, each of another task, so that each has p = ``negatives`` others (section 4.1).

    A step holds one task, some of those nearest to it, and tasks whose turn it is. Tasks, and the texts of each, are
    dealt without repetition until all had their turn.

    Args:
        tasks: two or more, as ``distinct`` leaves them.
        steps: how many steps.
        negatives: p; fewer where there are no more tasks.
        near: for each task the names of others, the nearest first: the negatives that are hard to tell apart.
        hard: the share of a step's negatives that is taken from the nearest.
        seed: the same for the same plan.
    """
    dice = random.Random(seed)
    by_name = {task.name: task for task in tasks}
    names = _Deck([task.name for task in tasks], dice)
    texts = {task.name: _Deck(task.inputs, dice) for task in tasks}
    size = min(negatives + 1, len(tasks))
    planned = []
    for _ in range(steps):
        first = names.deal()
        chosen = [first]
        # Twice as many candidates as places, so that the same neighbours do not always meet.
        wanted = round(hard * (size - 1))
        neighbours = [name for name in near.get(first, ())[: 2 * wanted] if name in by_name]
        chosen += dice.sample(neighbours, min(wanted, len(neighbours)))
        while len(chosen) < size:
            chosen.append(names.deal(but=chosen))
        planned.append([_pair(by_name[name], texts[name]) for name in chosen])
    return planned


def distinct(tasks: Sequence[Task]) -> list[Task]:
    """Tasks without repeated texts, and without those that several share: such a text is right for each of them.

    A task that has no other texts is left out.

    Raises:
        SamplesError: fewer than two tasks are left.
    """
    texts = [{folded(text): storable(text) for text in task.inputs if text.strip()} for task in tasks]
    owners = Counter(key for keyed in texts for key in keyed)
    kept = []
    for task, keyed in zip(tasks, texts, strict=True):
        own = {key: text for key, text in keyed.items() if owners[key] == 1}
        if own:
            kept.append(Task(task.name, tuple(own.values()), task.domain))
    if len(kept) < 2:
        raise SamplesError(
            "training",
            f"{len(tasks)} tasks were given, and {len(kept)} of them have texts that no other has; a retriever learns "
            "from the difference of two tasks or more",
        )
    return kept


def _pair(task: Task, texts: _Deck) -> Pair:
    anchor = texts.deal()
    return Pair(task.name, anchor, texts.deal(but=[anchor]) if len(task.inputs) > 1 else anchor)


class _Deck:
    """Deals every card before any comes again."""

    def __init__(self, cards: Sequence[str], dice: random.Random) -> None:
        self._cards = list(cards)
        self._dice = dice
        self._left: list[str] = []

    def deal(self, but: Sequence[str] = ()) -> str:
        """The next card that is not among ``but``, of which there are fewer than cards."""
        passed: list[str] = []
        while True:
            if not self._left:
                held = set(passed)
                fresh = [card for card in self._cards if card not in held]
                self._dice.shuffle(fresh)
                self._left = fresh
            card = self._left.pop()
            if card not in but:
                self._left.extend(reversed(passed))
                return card
            passed.append(card)
