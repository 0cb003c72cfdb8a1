"""What a gate is trained on: rows with their adapter and answer, dealt into steps with candidate adapters. Pure."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.samples import read_samples


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
class Place:
    """A row in a step: its number, and the numbers of the adapters that it chooses from, at least one."""

    row: int
    members: tuple[int, ...]


def read_gate_rows(rows: Iterable[Mapping[str, Any]] | str | os.PathLike[str]) -> list[GateRow]:
    """Rows of ``{"inputs", "targets", "adapter"}``, given as they are or as a file of JSON lines.

    Raises:
        ConfigurationError: a row of another form, told by its number and never by its content, or no row.
    """
    given: Iterable[Any] = read_samples(rows) if isinstance(rows, str | os.PathLike) else rows
    found = [_row(row, number) for number, row in enumerate(given, start=1)]
    if not found:
        raise ConfigurationError('rows: there are none; expected {"inputs", "targets", "adapter"} in each')
    return found


def _row(row: object, number: int) -> GateRow:
    values = [row.get(name) for name in ("inputs", "adapter", "targets")] if isinstance(row, Mapping) else []
    match [value for value in values if isinstance(value, str) and value.strip()]:
        case [inputs, adapter, targets]:
            return GateRow(inputs, adapter, targets)
    raise ConfigurationError(f'row {number}: expected an object with the texts "inputs", "targets" and "adapter"')


def hold_out(rows: Sequence[GateRow], share: float, most: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows to train on, and of those to measure with: as many of each adapter, and never all of one."""
    by_adapter = _by_adapter(rows)
    held: list[int] = []
    for name, numbers in by_adapter.items():
        wanted = max(1, round(share * len(numbers))) if share else 0
        count = min(wanted, max(1, most // len(by_adapter)), len(numbers) - 1)
        held += random.Random(f"{seed} {name}").sample(numbers, count)
    out = set(held)
    return [number for number in range(len(rows)) if number not in out], sorted(out)


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
    by_adapter = _by_adapter([rows[number] for number in numbers])
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


def _by_adapter(rows: Sequence[GateRow]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.adapter, []).append(number)
    return found


def _deal(cards: Sequence[Any], turn: int, seed: str) -> Any:
    """The card of that turn, where each round of all cards has an order of its own."""
    rounds, place = divmod(turn, len(cards))
    return random.Random(f"{seed} {rounds}").sample(cards, len(cards))[place]
