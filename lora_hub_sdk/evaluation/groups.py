"""Groups of systems: those that may find a prompt's own adapter, those that must do without, those that were taught."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from lora_hub_sdk.evaluation.systems import DESCRIPTIONS

Group = Literal["reference", "seen", "unseen", "learned"]
#: What each group is called where people read it.
TITLES: Final[dict[Group, str]] = {
    "reference": "for comparison",
    "seen": "the own adapter in the pool",
    "learned": "taught by rows of the tasks",
    "unseen": "the own adapter left out",
}
#: What each is held against: the own adapter alone, or the nearest of the others.
PERFECT: Final = "perfect"
SELECTION_UNSEEN: Final = "selection-ood"
BASE: Final = "base"


def group_of(system: str, *, learns: bool) -> Group:
    """By a system's name and whether it was taught."""
    name = system.partition("@")[0]
    if name in (BASE, PERFECT):
        return "reference"
    if name.endswith("-ood"):
        return "unseen"
    return "learned" if learns else "seen"


def reference_of(group: Group) -> str:
    """The system that those of a group are held against."""
    return SELECTION_UNSEEN if group == "unseen" else PERFECT


def in_order(systems: Iterable[str]) -> tuple[str, ...]:
    """As the catalogue has them, each before its variants of another k; others follow."""
    known = list(DESCRIPTIONS)

    def place(system: str) -> tuple[int, int, str]:
        name, _, k = system.partition("@")
        at = known.index(name) if name in DESCRIPTIONS else len(known)
        return at, int(k) if k.isdecimal() else 0, system

    return tuple(sorted(systems, key=place))
