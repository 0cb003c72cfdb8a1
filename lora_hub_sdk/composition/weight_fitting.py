"""Weights that are learned from a pool's own samples: by maximum likelihood of the adapter that each of them is of.

A weighting's loss is the Fenchel-Young loss of its map (arXiv 1901.02324): for softmax the log-likelihood itself, for
1.5-entmax the convex loss whose gradient is also "weights less target". The target is spread evenly over the right
adapters among the hits. Every fit is a convex search over one or two factors, 0 or more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.composition.weighting import LEARNED, SIMILARITY_TEMPERATURE, WEIGHTINGS, WeightRule, entmax, softmax
from lora_hub_sdk.errors import ConfigurationError, SamplesError
from lora_hub_sdk.retriever.accuracy import Share
from lora_hub_sdk.retriever.held_out import HeldOut, encoded, hold_out
from lora_hub_sdk.retriever.query import check_k
from lora_hub_sdk.retriever.sample_pool import ENOUGH, SamplePool
from lora_hub_sdk.retriever.tasks import task_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.retriever.encoder import Encoder
    from lora_hub_sdk.retriever.questions import Question
    from lora_hub_sdk.retriever.tasks import Task
    from lora_hub_sdk.types import Adapter

#: Adapters whose samples are embedded, and samples of one of them; of more adapters, as many are drawn.
_MOST_ADAPTERS: Final = 500
_MOST_SAMPLES: Final = 100
_FOLDS: Final = 5
_RESAMPLES: Final = 1000
#: A weight below counts as this in a likelihood, which one weight of 0 would else make infinite.
_LEAST: Final = 1e-3
#: Standard deviation of the normal prior of a factor, in logits for each standard deviation of what it multiplies.
_PRIOR: Final = 10.0
#: No two hits that differ by 0.001 in cosine are told apart by more than one logit.
_STEEPEST: Final = 1000.0


@dataclass(frozen=True, slots=True)
class WeightingScores:
    """How one weighting did on searches whose right adapter is known.

    Attributes:
        log_likelihood: mean natural logarithm of the right adapters' weight, where they are among the hits; weights
            below 0.001 count as 0.001.
        top: share whose largest weight is a right adapter's.
        owner: mean weight of the right adapters, 0 where none is among the hits.
        used: mean number of adapters with a weight above 0.
    """

    log_likelihood: Share
    top: Share
    owner: Share
    used: Share


@dataclass(frozen=True, slots=True)
class WeightFit:
    """What the samples say of how hits should be weighed.

    ``scores`` are by weighting; the learned ones are measured on adapters that they were not fitted on. Intervals are
    95 % bootstrap intervals over adapters. ``rows`` searches, of which ``found`` (a share) had a right adapter among
    their ``k`` hits, of ``adapters`` adapters; ``skipped`` ones have no kept samples. ``warnings`` are for people.
    """

    rule: WeightRule
    k: int
    rerank: bool
    rows: int
    found: float
    adapters: int
    skipped: int
    scores: Mapping[str, WeightingScores]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "temperature": self.rule.temperature, "warnings": list(self.warnings)}


def fit_weights(held: HeldOut, *, k: int, rerank: bool = False, skipped: int = 0, seed: int = 0) -> WeightFit:
    """Find the numbers of every learned weighting, and measure all of them side by side by cross-validation.

    Args:
        held: searches with their hits.
        k, rerank: how they were made, for the record.
        skipped: adapters without kept samples, for the record.
        seed: of the folds and the bootstrap.

    Raises:
        SamplesError: no search had both a right adapter and a wrong one among its hits.
    """
    if not _telling(held).any():
        raise SamplesError(
            "registry",
            "weights are learned from adapters that compete: register two or more for one base model, each with "
            "samples=[...] of its own, at least two",
        )
    adapters = np.unique(held.adapters)
    folds = dict(zip(np.random.default_rng(seed).permutation(adapters), np.arange(len(adapters)) % _FOLDS, strict=True))
    fold = np.array([folds[adapter] for adapter in held.adapters])
    weights = {name: np.zeros(held.cosines.shape) for name in WEIGHTINGS}
    for number in range(min(_FOLDS, len(adapters))):
        rule, rows = _fitted(held[fold != number]), fold == number
        part = held[rows]
        for name in LEARNED:
            weights[name][rows] = rule.weights(name, part.cosines, part.words)
    there = np.isfinite(held.cosines)
    weights["uniform"] = there / there.sum(axis=1, keepdims=True)
    weights["similarity"] = softmax(held.cosines / SIMILARITY_TEMPERATURE)
    warnings = []
    if len(held) < ENOUGH:
        warnings.append(f"only {len(held)} samples were searched with: the numbers may be far off")
    return WeightFit(
        _fitted(held),
        k,
        rerank,
        len(held),
        float(held.right.any(axis=1).mean()),
        len(adapters),
        skipped,
        {name: _scores(found, held, seed) for name, found in weights.items()},
        tuple(warnings),
    )


def fit_weights_encoder(
    encoder: Encoder,
    tasks: Sequence[Task],
    adapters: Mapping[str, Adapter],
    *,
    k: int = 3,
    questions: Sequence[Question] = (),
    rerank: bool = False,
    trained: Collection[str] = (),
    seed: int = 0,
) -> WeightFit:
    """``fit_weights`` on tasks by an encoder; of more than 500, as many are drawn, with 100 inputs each.

    Only adapters for one base model compete, as in a route.

    Args:
        tasks: each named as its adapter is.
        adapters: all in service, by name; those that are no task count as skipped.
        questions: searched with too, each with the name of its adapter.
        trained: names of adapters whose samples the encoder was trained on.

    Raises:
        ConfigurationError: a k below 1, or a question for an adapter that is none of the tasks.
        SamplesError: as ``fit_weights``.
    """
    check_k(k)
    asked = {question.task for question in questions}
    if unknown := sorted(asked - {task.name for task in tasks}):
        raise ConfigurationError(
            f"questions for {', '.join(map(repr, unknown))}, no adapters in service whose samples were kept; leave "
            "them out, or register these adapters with samples=[...]"
        )
    chosen, warnings = [replace(task, inputs=task.inputs[:_MOST_SAMPLES]) for task in tasks], list[str]()
    if len(chosen) > _MOST_ADAPTERS:
        order = np.random.default_rng(seed).permutation(len(chosen))
        # Who is asked for has to be there.
        places = sorted(order, key=lambda place: chosen[place].name not in asked)[:_MOST_ADAPTERS]
        chosen = [chosen[place] for place in sorted(places)]
        warnings.append(
            f"{_MOST_ADAPTERS} of {len(tasks)} adapters were drawn: among all, the right one has more rivals"
        )
    vectors, known = task_vectors(encoder, chosen), encoded(encoder, questions)
    parts = []
    for base in sorted({adapters[task.name].base_model for task in chosen}):
        own = [task for task in chosen if adapters[task.name].base_model == base]
        names = {task.name for task in own}
        held, notes = hold_out(
            SamplePool(own, vectors),
            k,
            contents={name: adapters[name].digest for name in names},
            questions=[(question, vector) for question, vector in known if question.task in names],
            rerank=rerank,
            trained=trained,
            seed=seed,
        )
        parts.append(held)
        warnings += [note for note in notes if note not in warnings]
    skipped = len(adapters) - len(tasks)
    found = fit_weights(HeldOut.joined(parts), k=k, rerank=rerank, skipped=skipped, seed=seed)
    return replace(found, warnings=(*warnings, *found.warnings))


def _telling(held: HeldOut) -> NDArray[np.bool_]:
    """Which searches tell something of weights: a right adapter and a wrong one among the hits."""
    wrong = np.isfinite(held.cosines) & ~held.right
    both: NDArray[np.bool_] = np.logical_and(wrong.any(axis=1), held.right.any(axis=1))
    return both


def _fitted(held: HeldOut) -> WeightRule:
    """The numbers of every learned weighting; uniform weights where nothing tells."""
    part = held[_telling(held)]
    if not len(part):
        return WeightRule(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    cosines, there = np.where(np.isfinite(part.cosines), part.cosines, 0.0), np.isfinite(part.cosines)
    known = ~np.isnan(part.words)
    slope, start = np.polyfit(cosines[known], part.words[known], 1) if known.sum() > 2 else (0.0, 0.0)
    words = np.where(known, part.words, start + slope * cosines) * there
    targets = part.right / part.right.sum(axis=1, keepdims=True)
    alone = cosines[..., None]
    (fitted,) = _minimum(_SOFTMAX, alone, there, targets)
    (sparse,) = _minimum(_ENTMAX, alone, there, targets)
    cosine, word = _minimum(_ENTMAX, np.stack([cosines, words], axis=-1), there, targets)
    return WeightRule(*map(float, (fitted, sparse, cosine, word, start, slope)))


@dataclass(frozen=True, slots=True)
class _Map:
    """A map from logits to weights, its regulariser, and the s of its Jacobian diag(s) - s s' / sum(s)."""

    weights: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    regulariser: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    slopes: Callable[[NDArray[np.float64]], NDArray[np.float64]]


_SOFTMAX: Final = _Map(
    softmax, lambda p: np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0).sum(axis=1), lambda p: p
)
_ENTMAX: Final = _Map(entmax, lambda p: ((p**1.5).sum(axis=1) - 1) / 0.75, np.sqrt)


def _minimum(
    kind: _Map, features: NDArray[np.float64], there: NDArray[np.bool_], targets: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The factors, each from 0 to 1000, of features (n, k, d) that have the least mean loss, with a weak prior."""
    centred = features - (features * there[..., None]).sum(axis=1, keepdims=True) / there.sum(axis=1)[:, None, None]
    scales = np.sqrt((centred**2 * there[..., None]).sum(axis=(0, 1)) / there.sum())
    scales = np.where(scales > 1e-9, scales, np.inf)  # what never differs gets the factor 0
    scaled = centred / scales
    penalty = 1 / (_PRIOR**2 * len(features))

    def at(factors: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Loss, gradient (d,) and Hessian (d, d)."""
        logits = np.where(there, scaled @ factors, -np.inf)
        weights = kind.weights(logits)
        scores = np.where(there, logits, 0.0)
        losses = ((weights - targets) * scores).sum(axis=1) - kind.regulariser(weights)
        gradient = np.einsum("nk,nkd->d", weights - targets, scaled) / len(scaled) + penalty * factors
        slopes = kind.slopes(weights)
        means = np.einsum("nk,nkd->nd", slopes, scaled)
        curved = np.einsum("nk,nkd,nke->de", slopes, scaled, scaled)
        curved -= np.einsum("nd,ne->de", means / slopes.sum(axis=1, keepdims=True), means)
        hessian = curved / len(scaled) + penalty * np.eye(len(factors))
        return float(losses.mean()) + penalty / 2 * float(factors @ factors), gradient, hessian

    count = features.shape[-1]
    best, least = np.zeros(count), at(np.zeros(count))[0]
    # Convex, and few: the least within bounds is the least of those where the factors at the bound are left out.
    for size in range(1, count + 1):
        for free in combinations(range(count), size):
            factors = _newton(at, count, list(free))
            loss = at(factors)[0]
            if (factors >= 0).all() and loss < least - 1e-12:
                best, least = factors, loss
    return np.minimum(best / scales, _STEEPEST)


def _newton(
    at: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64], NDArray[np.float64]]],
    count: int,
    free: list[int],
) -> NDArray[np.float64]:
    """Newton's method over some of the factors, the others 0, with steps halved until they help."""
    factors = np.zeros(count)
    loss, gradient, hessian = at(factors)
    for _ in range(100):
        step = np.zeros(count)
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        # On the kinks of entmax a whole step may lead astray.
        for halvings in range(30):
            tried = factors - step / 2**halvings
            found = at(tried)
            if found[0] <= loss - 1e-4 / 2**halvings * float(gradient @ step):
                break
        else:
            break
        moved = loss - found[0]
        factors, (loss, gradient, hessian) = tried, found
        if moved < 1e-13:
            break
    return factors


def _scores(weights: NDArray[np.float64], held: HeldOut, seed: int) -> WeightingScores:
    there = held.right.any(axis=1)
    owner = (weights * held.right).sum(axis=1)
    columns = np.stack(
        [
            np.where(there, np.log(np.maximum(owner, _LEAST)), 0.0),
            held.right[np.arange(len(weights)), weights.argmax(axis=1)].astype(np.float64),
            owner,
            (weights > 0).sum(axis=1).astype(np.float64),
        ],
        axis=1,
    )
    counts = np.stack([there.astype(np.float64), *[np.ones(len(weights))] * 3], axis=1)
    _, groups = np.unique(held.adapters, return_inverse=True)
    size = int(groups.max()) + 1
    sums, totals = np.zeros((size, 4)), np.zeros((size, 4))
    np.add.at(sums, groups, columns)
    np.add.at(totals, groups, counts)
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=_RESAMPLES)
    many = (draws @ sums) / np.maximum(draws @ totals, 1e-9)
    low, high = np.quantile(many, [0.025, 0.975], axis=0)
    values = sums.sum(axis=0) / np.maximum(totals.sum(axis=0), 1e-9)
    return WeightingScores(*(Share(*map(float, found)) for found in zip(values, low, high, strict=True)))
