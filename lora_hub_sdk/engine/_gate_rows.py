"""What a gate is trained on: rows with their adapter and answer, dealt into steps with candidate adapters. Pure."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.samples import read_samples

Rows = Iterable[Mapping[str, Any]] | str | os.PathLike[str]
#: Batches whose rows are put in order by their size together.
_ALIKE: Final = 8


@dataclass(frozen=True, slots=True)
class GateRow:
    """A prompt, the name of the adapter that is for it, and the answer that is wanted.

    ``finished`` tells whether the answer ends there; one that was cut off by its length does not.
    """

    inputs: str
    adapter: str
    targets: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A prompt and the answer that is wanted, which ends there."""

    inputs: str
    targets: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Place:
    """A row in a step: its number, and the numbers of the adapters that it chooses from, at least one."""

    row: int
    members: tuple[int, ...]


def read_gate_rows(rows: Rows) -> list[GateRow]:
    """Rows of ``{"inputs", "targets", "adapter"}``, given as they are or as a file of JSON lines.

    Raises:
        ConfigurationError: a row of another form, told by its number and never by its content, or no row.
    """
    found = _texts(rows, ("inputs", "targets", "adapter"))
    return [GateRow(inputs, adapter, targets) for inputs, targets, adapter in found]


def read_answer_rows(rows: Rows) -> list[AnswerRow]:
    """Rows of ``{"inputs", "targets"}``, as ``read_gate_rows``."""
    return [AnswerRow(inputs, targets) for inputs, targets in _texts(rows, ("inputs", "targets"))]


def _texts(rows: Rows, names: Sequence[str]) -> list[list[str]]:
    given: Iterable[Any] = read_samples(rows) if isinstance(rows, str | os.PathLike) else rows
    wanted = ", ".join(f'"{name}"' for name in names)
    found = []
    for number, row in enumerate(given, start=1):
        values = [row.get(name) for name in names] if isinstance(row, Mapping) else []
        if len(texts := [value for value in values if isinstance(value, str) and value.strip()]) < len(names):
            raise ConfigurationError(f"row {number}: expected an object with the texts {wanted}")
        found.append(texts)
    if not found:
        raise ConfigurationError(f"rows: there are none; expected {{{wanted}}} in each")
    return found


def hold_out(owners: Sequence[str], share: float, most: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on, and of those to measure with: as many of each owner, and never all of one.

    Args:
        owners: whose each row is.
    """
    by_owner = _by_owner(owners)
    held: list[int] = []
    for name, numbers in by_owner.items():
        wanted = max(1, round(share * len(numbers))) if share else 0
        count = min(wanted, max(1, most // len(by_owner)), len(numbers) - 1)
        held += random.Random(f"{seed} {name}").sample(numbers, count)
    out = set(held)
    return [number for number in range(len(owners)) if number not in out], sorted(out)


def plan_rows(sizes: Sequence[int], *, step: int, batch: int, seed: int) -> list[int]:
    """The rows of one training step, about ``batch`` of them and of similar size; depends on the arguments alone.

    All rows take turns, and each round of them has an order of its own.
    """
    count = -(-len(sizes) // batch)
    rounds, place = divmod(step, count)
    dice = random.Random(f"{seed} round {rounds}")
    order = dice.sample(range(len(sizes)), len(sizes))
    several = _ALIKE * batch
    # Among a few batches' rows, not among all: else each row would always meet the same ones.
    mixed = [
        row
        for start in range(0, len(order), several)
        for row in sorted(order[start : start + several], key=sizes.__getitem__)
    ]
    chosen = dice.sample(range(count), count)[place]
    return mixed[chosen * batch : (chosen + 1) * batch]


def plan_step(
    rows: Sequence[GateRow],
    numbers: Sequence[int],
    near: Mapping[int, Sequence[int]],
    names: Sequence[str],
    *,
    step: int,
    batch: int,
    k: int,
    drop: float,
    others: float,
    seed: int,
) -> list[Place]:
    """The rows of one training step and what each chooses from; depends on the arguments alone.

    Adapters take turns, and so do the rows of each. A row's candidates are its nearest adapters or, for a share
    ``others`` of the rows, its own and k - 1 at random. Each of them is dropped with probability ``drop``, its own too;
    one stays.

    Args:
        numbers: of the rows to train on.
        near: by a row's number, the numbers of its k nearest adapters.
        names: of the adapters, by number.
    """
    dice = random.Random(f"{seed} step {step}")
    by_adapter = _by_owner([rows[number].adapter for number in numbers])
    owners = list(by_adapter)
    placed = []
    for turn in range(step * batch, (step + 1) * batch):
        owner = _deal(owners, turn, f"{seed} owners")
        own = by_adapter[owner]
        number = numbers[_deal(own, turn // len(owners), f"{seed} {owner}")]
        if dice.random() < others:
            rest = [place for place in range(len(names)) if names[place] != owner]
            chosen = [names.index(owner), *dice.sample(rest, min(k - 1, len(rest)))]
        else:
            chosen = list(near[number])
        kept = [place for place in chosen if dice.random() >= drop] or [dice.choice(chosen)]
        placed.append(Place(number, tuple(kept)))
    return placed


def _by_owner(owners: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, owner in enumerate(owners):
        found.setdefault(owner, []).append(number)
    return found


def _deal(cards: Sequence[Any], turn: int, seed: str) -> Any:
    """The card of that turn, where each round of all cards has an order of its own."""
    rounds, place = divmod(turn, len(cards))
    return random.Random(f"{seed} {rounds}").sample(cards, len(cards))[place]
