"""The shapes that data takes on its way from a source to a training file."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lora_hub_sdk.demo.training.metrics import MetricName
from lora_hub_sdk.demo.training.sources import SourceCache

HELD_OUT = 50
SAMPLES = 20


@dataclass(frozen=True)
class Item:
    """One example before a template words it; the answer depends on ``text`` (and ``context``)."""

    text: str
    targets: str
    context: str = ""


@dataclass(frozen=True)
class Row:
    """One prompt and its answer, as trained and as tested."""

    inputs: str
    targets: str


@dataclass(frozen=True)
class Split:
    """The rows of one task; no item stands in both ``train`` and ``heldout``, whatever template words it."""

    train: tuple[Row, ...]
    samples: tuple[Row, ...]
    heldout: tuple[Row, ...]


class ItemSource(Protocol):
    """Yields candidate items for one task; repeats are allowed and dropped later."""

    def __call__(self, rng: random.Random, cache: SourceCache) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Task:
    """One demo task: its items, the wordings of its instruction and what the model card says about it."""

    name: str
    summary: str
    metric: MetricName
    languages: tuple[str, ...]
    source: str
    licence_id: str
    licence: str
    templates: tuple[str, ...]
    items: ItemSource
    max_new_tokens: int = 8


def build_split(task: Task, cache: SourceCache, *, train_rows: int, seed: int) -> Split:
    """Build the rows of ``task``: ``train_rows`` to learn from (fewer from a small source), 50 held out.

    Items are made unique before they are worded, so no held-out question reappears under another template.

    Raises:
        ValueError: the source gave too few items to hold any out.
    """
    rng = random.Random(f"{task.name}/{seed}")
    items = list(_distinct(task.items(rng, cache), train_rows + HELD_OUT))
    if len(items) < HELD_OUT + SAMPLES:
        raise ValueError(f"task {task.name}: the source gave {len(items)} items, at least {HELD_OUT + SAMPLES} needed")
    heldout, rest = items[:HELD_OUT], items[HELD_OUT:]
    rng.shuffle(rest)
    train = _word_in_turn(rest, task.templates)
    # Templates take turns along `train`, so its head already spreads the samples over all wordings.
    return Split(train, train[:SAMPLES], _word_in_turn(heldout, task.templates))


def alternate(groups: Sequence[Sequence[Item]], rng: random.Random) -> Iterator[Item]:
    """Yield items so that every stretch is balanced over the groups, in an order that carries no pattern.

    Each round takes one item of every group, shuffled: templates alternate by position, and a fixed label
    order would tie labels to wordings. Ends with the smallest group.
    """
    for turn in zip(*groups, strict=False):
        yield from rng.sample(turn, len(turn))


def _distinct(items: Iterable[Item], limit: int) -> Iterator[Item]:
    seen: set[tuple[str, str]] = set()
    for item in items:
        key = (item.context.casefold(), item.text.casefold())
        if key in seen:
            continue
        seen.add(key)
        yield item
        if len(seen) == limit:
            return


def _word_in_turn(items: Sequence[Item], templates: Sequence[str]) -> tuple[Row, ...]:
    return tuple(
        Row(template.format(text=item.text, context=item.context), item.targets)
        for item, template in zip(items, itertools.cycle(templates), strict=False)
    )
