"""Adapters as their own samples find them: each sample searches as a prompt would, left out of its adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from lora_hub_sdk.retriever.lexicon import Grams, Profile, grams, profile
from lora_hub_sdk.retriever.samples import folded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.retriever.tasks import Task

#: Fewer samples tell shares only to some points in a hundred.
ENOUGH: Final = 100
#: Samples that are searched with; of more, as many are drawn.
_MOST_SEARCHES: Final = 4000


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """A text and the adapters that have it: for each its place in the pool, and the text's place among its samples."""

    owners: Mapping[int, int]
    grams: Grams
    vector: NDArray[np.float64]


class SamplePool:
    """Adapters with their samples, and a search for each distinct sample.

    A sample that several adapters have is one search, left out of all of them.

    Args:
        tasks: the adapters, each with a name of its own.
        vectors: for each name those of its inputs in their order, (n, d), of length 1.
    """

    def __init__(self, tasks: Sequence[Task], vectors: Mapping[str, NDArray[np.float32]]) -> None:
        self.tasks = tasks
        self.vectors = [np.asarray(vectors[task.name], dtype=np.float64) for task in tasks]
        self.profiles = [profile(task.inputs) for task in tasks]
        self._sums = np.stack([rows.sum(axis=0) for rows in self.vectors])
        self._means = np.stack([_unit(total) for total in self._sums])
        owners: dict[str, dict[int, int]] = {}
        for place, task in enumerate(tasks):
            for row, text in enumerate(task.inputs):
                owners.setdefault(folded(text), {}).setdefault(place, row)
        #: By their folded text.
        self.searches = {text: self._search(found) for text, found in owners.items()}

    def _search(self, owners: dict[int, int]) -> Search:
        place, row = next(iter(owners.items()))
        return Search(owners, grams(self.tasks[place].inputs[row]), self.vectors[place][row])

    def found_by(self, search: Search) -> tuple[NDArray[np.float64], dict[int, Profile | None]]:
        """Each adapter's cosine to a search, (adapters,), and the profiles of those whose sample was left out."""
        cosines = self._means @ search.vector
        changed = dict[int, Profile | None]()
        for owner, row in search.owners.items():
            cosines[owner] = _unit(self._sums[owner] - self.vectors[owner][row]) @ search.vector
            changed[owner] = _without(self.profiles[owner], search.grams)
        return cosines, changed

    def left(self, owner: int) -> bool:
        """Whether an adapter can be found when one of its samples is left out."""
        return len(self.vectors[owner]) > 1

    def drawn(self, trained: Collection[str], seed: int) -> tuple[list[Search], list[str]]:
        """The searches to measure with, at most 4,000, and what a person should know of them.

        Args:
            trained: names of tasks that the encoder was trained on. It knows their samples better than any prompt, so
                they search only where fewer than 100 samples of other tasks are there.
        """
        chosen, warnings = list(self.searches.values()), list[str]()
        if trained:
            names = [task.name for task in self.tasks]
            fresh = [one for one in chosen if not any(names[owner] in trained for owner in one.owners)]
            if sum(any(self.left(owner) for owner in one.owners) for one in fresh) >= ENOUGH:
                chosen = fresh
            else:
                warnings.append(
                    "the encoder was trained on most of these samples: prompts will score lower than they do"
                )
        if len(chosen) > _MOST_SEARCHES:
            places = np.random.default_rng(seed).choice(len(chosen), _MOST_SEARCHES, replace=False)
            chosen = [chosen[place] for place in sorted(places)]
        return chosen, warnings


def _without(whole: Profile | None, sample: Grams) -> Profile | None:
    """An adapter's profile with one of its samples left out."""
    if whole is None or whole.samples < 2:
        return None
    if not len(sample):  # it was never part of it
        return whole
    counts = whole.counts.copy()
    counts[np.searchsorted(whole.grams, sample)] -= 1
    shares = counts / np.float64(whole.samples - 1)
    norm = float(np.sqrt(shares @ shares))
    return Profile(whole.grams, counts, whole.samples - 1, norm) if norm > 0 else None


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    # Left as it is where it has no direction: its cosines are 0.
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-12 else vector
