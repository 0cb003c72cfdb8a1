"""Searches whose right answer is known, as weights are fitted and measured on them: samples left out, and questions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.retriever.fitting import wording
from lora_hub_sdk.retriever.lexicon import Profile, grams
from lora_hub_sdk.retriever.reranker import CANDIDATES, relevance
from lora_hub_sdk.retriever.sample_pool import SamplePool, Search
from lora_hub_sdk.retriever.samples import folded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.retriever.encoder import Encoder
    from lora_hub_sdk.retriever.questions import Question


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """n searches with their k hits in the order of the search, all from other texts than the one that searched.

    Attributes:
        cosines: (n, k), -inf where fewer adapters could be found.
        words: (n, k), the wording of each hit among these (``fitting.wording``); NaN where nobody knows.
        right: (n, k), whether the hit is an adapter that has the text, or one of the same content.
        adapters: (n,), a number for the first adapter that has the text.
    """

    cosines: NDArray[np.float64]
    words: NDArray[np.float64]
    right: NDArray[np.bool_]
    adapters: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.bool_]) -> HeldOut:
        return HeldOut(self.cosines[rows], self.words[rows], self.right[rows], self.adapters[rows])

    def __len__(self) -> int:
        return len(self.adapters)

    @classmethod
    def joined(cls, parts: Sequence[HeldOut]) -> HeldOut:
        """One after the other; no two share an adapter."""
        shift = np.cumsum([0, *(int(part.adapters.max(initial=-1)) + 1 for part in parts)])
        return cls(
            np.concatenate([part.cosines for part in parts]),
            np.concatenate([part.words for part in parts]),
            np.concatenate([part.right for part in parts]),
            np.concatenate([part.adapters + start for part, start in zip(parts, shift, strict=False)]),
        )


def hold_out(
    pool: SamplePool,
    k: int,
    *,
    contents: Mapping[str, str] | None = None,
    questions: Iterable[tuple[Question, NDArray[np.float32]]] = (),
    rerank: bool = False,
    trained: Collection[str] = (),
    seed: int = 0,
) -> tuple[HeldOut, list[str]]:
    """Search a pool with its own samples, each left out of its adapters, and with questions; also what to warn of.

    Texts none of whose adapters can be found without them are dropped.

    Args:
        contents: what each adapter's content is, by name; those of one content are right together.
        questions: with their vectors, (d,); those of one text are one search, and all their adapters are right.
        rerank: whether hits come in the order of their words too, as in such searches.
        trained: as for ``SamplePool.drawn``.

    Raises:
        ConfigurationError: a question for an adapter that is not in the pool.
    """
    asked = _asked(pool, questions)
    drawn, warnings = pool.drawn(trained, seed)
    told = contents or {}
    alike: dict[str, set[int]] = {}
    for place, task in enumerate(pool.tasks):
        alike.setdefault(told.get(task.name, task.name), set()).add(place)
    same = [alike[told.get(task.name, task.name)] for task in pool.tasks]
    taken = {id(search) for search, _ in asked}
    pairs = [*asked, *((search, set(search.owners)) for search in drawn if id(search) not in taken)]
    rows = [_row(pool, search, set().union(*(same[place] for place in owners)), k, rerank) for search, owners in pairs]
    kept = [(row, min(owners)) for row, (_, owners) in zip(rows, pairs, strict=True) if row is not None]
    if not kept:
        none = np.zeros((0, k))
        return HeldOut(none, none, none.astype(bool), np.zeros(0, dtype=np.int64)), warnings
    cosines, words, right = (np.array(column) for column in zip(*(row for row, _ in kept), strict=True))
    return HeldOut(cosines, words, right, np.array([owner for _, owner in kept])), warnings


def _asked(
    pool: SamplePool, questions: Iterable[tuple[Question, NDArray[np.float32]]]
) -> list[tuple[Search, set[int]]]:
    places = {task.name: place for place, task in enumerate(pool.tasks)}
    found: dict[str, tuple[Search, set[int]]] = {}
    for question, vector in questions:
        if question.task not in places:
            raise ConfigurationError(
                f"a question is for {question.task!r}, which is no adapter in service whose samples were kept; "
                "leave it out, or register the adapter with samples=[...]"
            )
        text = folded(question.text)
        if text not in found:
            search = pool.searches.get(text)
            if search is None:
                search = Search({}, grams(question.text), np.asarray(vector, dtype=np.float64))
            found[text] = search, set(search.owners)
        found[text][1].add(places[question.task])
    return list(found.values())


def _row(
    pool: SamplePool, search: Search, right: set[int], k: int, rerank: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]] | None:
    """Cosines, wordings and rightness of the k hits; None where no right adapter could be among them."""
    cosines, changed = pool.found_by(search)
    gone = {owner for owner in search.owners if not pool.left(owner)}
    if not right - gone:
        return None
    cosines[list(gone)] = -np.inf

    def profiles(places: Iterable[int]) -> list[Profile | None]:
        return [changed[place] if place in changed else pool.profiles[place] for place in places]

    near = np.argsort(-cosines, kind="stable")[: max(k, CANDIDATES) if rerank else k]
    near = near[np.isfinite(cosines[near])]
    if rerank:
        first = near[:CANDIDATES]
        order = np.argsort(-relevance(cosines[first], search.grams, profiles(first)), kind="stable")
        near = np.concatenate([first[order], near[CANDIDATES:]])[:k]
    found, shared, owns = np.full(k, -np.inf), np.full(k, np.nan), np.zeros(k, dtype=bool)
    found[: len(near)] = cosines[near]
    shared[: len(near)] = wording(search.grams, profiles(near))
    owns[: len(near)] = [int(place) in right for place in near]
    return found, shared, owns


def encoded(encoder: Encoder, questions: Sequence[Question]) -> list[tuple[Question, NDArray[np.float32]]]:
    """Questions with their vectors; all are encoded in one call."""
    return list(zip(questions, encoder.encode([one.text for one in questions]), strict=True)) if questions else []
