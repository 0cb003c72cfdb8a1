"""From which score on an adapter fits a prompt: found from the samples themselves, each left out of its adapter.

The bound is that of split conformal prediction. Where a prompt is drawn as the samples were, and scored as they are, it
is left to the base model with a probability of at most ``false_abstain``, whatever the scores look like.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.retriever.fitting import FitRule, wording
from lora_hub_sdk.retriever.lexicon import Grams, Profile
from lora_hub_sdk.retriever.reranker import CANDIDATES
from lora_hub_sdk.retriever.sample_pool import ENOUGH, SamplePool, Search
from lora_hub_sdk.retriever.tasks import task_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.retriever.encoder import Encoder
    from lora_hub_sdk.retriever.tasks import Task

#: What a cosine may count beside the wording; the one that lets the fewest strange prompts through is taken.
_WEIGHTS: Final = (0.25, 0.5, 1.0, 2.0)
#: Adapters whose samples are embedded, and samples of one of them; of more adapters, as many are drawn.
_MOST_ADAPTERS: Final = 500
_MOST_SAMPLES: Final = 100
#: Hits carry so many digits.
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of samples. ``false_abstain``: left out of its own adapter, no adapter fits a sample any more.

    ``false_route``: with its own adapter taken away, some adapter still fits. ``false_route_domain``: with its whole
    domain taken away. None where there was nothing to measure it on.
    """

    false_abstain: float
    false_route: float | None
    false_route_domain: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the samples say of when an adapter fits.

    ``min_score`` is the bound for the cosine alone, -1 where there are too few samples to have one; ``rule`` also goes
    by shared words. ``by_cosine`` and ``by_rule`` tell how often each errs, among the samples themselves. ``samples``
    were searched with, among ``adapters``; ``skipped`` adapters have no kept samples. ``warnings`` are for people.
    """

    false_abstain: float
    min_score: float
    rule: FitRule
    by_cosine: Rates
    by_rule: Rates
    samples: int
    adapters: int
    skipped: int = 0
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "warnings": list(self.warnings)}


def calibrate(
    tasks: Sequence[Task],
    vectors: Mapping[str, NDArray[np.float32]],
    *,
    false_abstain: float = 0.05,
    trained: Collection[str] = (),
    skipped: int = 0,
    seed: int = 0,
) -> Calibration:
    """Find the bounds that leave at most a share ``false_abstain`` of fitting prompts to the base model.

    Each sample searches as a prompt would, left out of its adapter's mean and words. A sample that several adapters
    have is left out of all of them; adapters are taken away together where they share it.

    Args:
        tasks: the adapters, each with a name of its own.
        vectors: for each name those of its inputs in their order, (n, d), of length 1.
        false_abstain: the share, between 0 and 1.
        trained: names of tasks that the encoder was trained on. It knows their samples better than any prompt, so they
            are searched, and search only where fewer than 100 samples of other tasks are there.
        skipped: adapters without kept samples, for the record.
        seed: of the draw where there are more than 4,000 samples.

    Raises:
        ConfigurationError: a share outside of (0, 1), or names that come twice.
        SamplesError: no task.
    """
    number = isinstance(false_abstain, int | float) and not isinstance(false_abstain, bool)
    if not number or not 0 < false_abstain < 1:
        raise ConfigurationError(f"false_abstain={false_abstain!r}: expected a share between 0 and 1, like 0.05")
    if len({task.name for task in tasks}) < len(tasks):
        raise ConfigurationError("two tasks have one name; give all texts of a task together")
    if not tasks:
        raise SamplesError("registry", "no adapter has samples to calibrate on; register some with samples=[...]")
    pool = _Pool(tasks, vectors)
    searches, warnings = pool.drawn(trained, seed)
    scores = _Scores.of(pool, searches)
    wanted = math.floor(false_abstain * (len(scores.own) + 1))
    if not wanted:
        warnings.append(
            f"{len(scores.own)} samples cannot bound a share of {false_abstain:g}: give at least "
            f"{math.ceil(1 / false_abstain) - 1}, or allow a larger share; until then everything fits"
        )
    elif len(scores.own) < ENOUGH:
        warnings.append(f"only {len(scores.own)} samples were searched with: the true share may be points away")
    bounds = [_bound(column, wanted) for column in scores.own.T]
    rates = [scores.rates(column, bound) for column, bound in enumerate(bounds)]
    best = min(range(1, len(bounds)), key=lambda column: (rates[column].false_route or 0.0, column))
    # No cosine is below -1, and no wording below 0.
    min_score = -1.0 if bounds[0] is None else bounds[0]
    weight = _WEIGHTS[best - 1]
    least = bounds[best]
    rule = FitRule(weight, -weight if least is None else least, min_score)
    if (rates[best].false_route or 0.0) > 0.5:
        warnings.append(
            "more than half of the samples whose adapter was taken away still fit another one: siblings are hard to "
            "tell apart; a trained encoder does better"
        )
    return Calibration(
        false_abstain, min_score, rule, rates[0], rates[best], len(scores.own), len(tasks), skipped, tuple(warnings)
    )


def calibrate_encoder(
    encoder: Encoder,
    tasks: Sequence[Task],
    *,
    false_abstain: float = 0.05,
    trained: Collection[str] = (),
    skipped: int = 0,
    seed: int = 0,
) -> Calibration:
    """``calibrate`` with the vectors of an encoder; of more than 500 tasks, as many are drawn, with 100 inputs each.

    Among more adapters the best scores are higher than among those drawn, so that the share of prompts that are left to
    the base model keeps its bound, and more strange ones are let through than told.
    """
    chosen, warnings = [replace(task, inputs=task.inputs[:_MOST_SAMPLES]) for task in tasks], tuple[str, ...]()
    if len(chosen) > _MOST_ADAPTERS:
        drawn = np.random.default_rng(seed).choice(len(chosen), _MOST_ADAPTERS, replace=False)
        chosen = [chosen[place] for place in sorted(drawn)]
        warnings = (f"{_MOST_ADAPTERS} of {len(tasks)} adapters were drawn: among all, more strange prompts fit one",)
    vectors = task_vectors(encoder, chosen)
    found = calibrate(chosen, vectors, false_abstain=false_abstain, trained=trained, skipped=skipped, seed=seed)
    return replace(found, warnings=warnings + found.warnings)


class _Pool(SamplePool):
    """What a search reaches at best, with and without its own adapters."""

    def __init__(self, tasks: Sequence[Task], vectors: Mapping[str, NDArray[np.float32]]) -> None:
        super().__init__(tasks, vectors)
        domains = {task.domain for task in tasks if task.domain is not None}
        self.domains = np.array([task.domain or "" for task in tasks]) if len(domains) > 1 else None

    def scores(self, search: Search) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """What a text reaches among all adapters, without its own, and without its domain: the best cosine, and the
        best fit by each weight. NaN where nothing is left to search."""
        cosines, profiles = self.found_by(search)
        others = np.ones(len(self.tasks), dtype=bool)
        there = others.copy()
        for owner in search.owners:
            others[owner], there[owner] = False, self.left(owner)
        # With every owner gone, all that is left is strangers.
        own = there if any(there[owner] for owner in search.owners) else np.zeros_like(there)
        far = np.zeros_like(others)
        if self.domains is not None:
            told = self.domains[list(search.owners)]
            far = others & ~np.isin(self.domains, told) & (self.domains != "") & bool(np.all(told != ""))
        return tuple(self._best(search.grams, cosines, profiles, allowed) for allowed in (own, others, far))  # type: ignore[return-value]

    def _best(
        self,
        prompt: Grams,
        cosines: NDArray[np.float64],
        changed: Mapping[int, Profile | None],
        allowed: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        places = np.flatnonzero(allowed)
        if not len(places):
            return np.full(1 + len(_WEIGHTS), np.nan)
        near = places[np.argsort(-cosines[places], kind="stable")[:CANDIDATES]]
        shared = wording(prompt, [changed[place] if place in changed else self.profiles[place] for place in near])
        # Without a word on either side there is nothing in common.
        shared = np.nan_to_num(shared)
        fits = [float(np.max(shared + weight * cosines[near])) for weight in _WEIGHTS]
        return np.array([float(cosines[near[0]]), *fits])


@dataclass(frozen=True, slots=True)
class _Scores:
    """(n, 1 + weights) of texts, by cosine and by each weight: in their pool, without their adapters, their domain."""

    own: NDArray[np.float64]
    strange: NDArray[np.float64]
    far: NDArray[np.float64]

    @classmethod
    def of(cls, pool: _Pool, searches: Sequence[Search]) -> _Scores:
        found = [pool.scores(search) for search in searches]
        return cls(*(_known(np.array(rows).reshape(-1, 1 + len(_WEIGHTS))) for rows in zip(*found, strict=True)))

    def rates(self, column: int, bound: float | None) -> Rates:
        """How often a bound errs; None keeps everything."""
        least = -math.inf if bound is None else bound

        def kept(rows: NDArray[np.float64]) -> float | None:
            return float(np.mean(rows[:, column] >= least)) if len(rows) else None

        own = kept(self.own)
        return Rates(0.0 if own is None else 1 - own, kept(self.strange), kept(self.far))


def _bound(scores: NDArray[np.float64], wanted: int) -> float | None:
    """The ``wanted``-th smallest, rounded down: a score that is rounded itself shall not fall below its own bound."""
    if not wanted:
        return None
    return math.floor(float(np.sort(scores)[wanted - 1]) * 10**_DIGITS) / 10**_DIGITS


def _known(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows[~np.isnan(rows).any(axis=1)]
