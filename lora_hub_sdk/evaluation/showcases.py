"""Prompts that need two adapters together (paper figure 5): what a composition does that none of them does alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.intervals import Interval, Scores
from lora_hub_sdk.evaluation.metrics import words_of
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.routed import RoutedSystem
from lora_hub_sdk.evaluation.run import run
from lora_hub_sdk.types import Routing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_hub_sdk.evaluation.answers import Answer
    from lora_hub_sdk.evaluation.ground import Ground

#: Whether an answer to a prompt does one thing that was asked for.
Check = Callable[[str, str], bool]
#: Function words by language; those that two share count for both.
STOP_WORDS: Final[Mapping[str, str]] = {
    "English": "the of and is are was it this that with for which you not have has from by at be to in a an",
    "French": "le la les l de des du d et est une un dans pour avec sur à au aux qui que pas ce cette vous je ne sont",
    "German": "der die das und ist ein eine nicht mit für auf den dem des von zu ich es im in sich sie zum bei",
    "Italian": "il la lo gli le l di che è e un una per con del della in nel sono da dei delle alla non si più",
    "Spanish": "el la los las de del y que es un una por con para en se no está como su lo más fue al",
}
ALONE: Final = ("first alone", "second alone")
COMPOSED: Final = ("mixture of the two", "fusion of the two", "mixture", "fusion")
_PLACEHOLDER: Final = "f1"
#: As many coins that all fall the same way are rarer than one in twenty.
_ENOUGH: Final = 6


@dataclass(frozen=True, slots=True)
class Showcase:
    """Prompts of one kind.

    Attributes:
        prompts: distinct ones; the first is the one to be shown.
        first, second: names of the two adapters that they need.
        checks: what counts as done, by name; an answer that passes them all is right. Stated before anything is asked.
    """

    name: str
    prompts: tuple[str, ...]
    first: str
    second: str
    checks: Mapping[str, Check]


@dataclass(frozen=True, slots=True)
class Shown:
    """What one system made of a showcase.

    Attributes:
        passed: share of answers that pass each check, in percent.
        right: share of those that pass them all, with its interval over the prompts.
        adapters: of the route of the first prompt.
        answer: to the first prompt.
    """

    passed: Mapping[str, float]
    right: Interval
    adapters: tuple[str, ...]
    answer: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": dict(self.passed),
            "right": self.right.as_dict(),
            "adapters": list(self.adapters),
            "answer": self.answer,
        }


@dataclass(frozen=True, slots=True)
class ShownCase:
    """One showcase.

    Attributes:
        prompts: how many there were; ``prompt`` is the first of them.
        systems: by name. "nearest 1" is the nearest adapter alone, and so on.
        single: of those with one adapter, the one that was right most often.
        gains: by composition, how much more often it was right than ``single``, in percent of the prompts; paired.
        only: by composition, how many prompts it alone is right on: no single adapter is.
    """

    name: str
    prompts: int
    prompt: str
    systems: Mapping[str, Shown]
    single: str
    gains: Mapping[str, Interval]
    only: Mapping[str, int]

    @property
    def composes(self) -> tuple[str, ...]:
        """The compositions that are right more often than any adapter alone, beyond the interval."""
        # No interval: every prompt came out the same, which is certain enough where there are some.
        same = self.prompts >= _ENOUGH
        return tuple(
            name
            for name, gain in self.gains.items()
            if gain.above(0) or (same and not gain.is_known and gain.value > 0)
        )

    def sentence(self) -> str:
        """What came out, in words."""
        best = self.systems[self.single].right.value
        if not self.composes:
            top = max(self.gains, key=lambda name: self.systems[name].right.value)
            return (
                f"{self.name}: not at this size. No composition is shown to be right more often than the best adapter "
                f"alone: {self.systems[top].right.value:.0f} % ({top}) against {best:.0f} % ({self.single}), of "
                f"{self.prompts} prompts."
            )
        told = ", ".join(f"{self.systems[name].right.value:.0f} % ({name})" for name in self.composes)
        return f"{self.name}: yes. {told} against {best:.0f} % ({self.single}), of {self.prompts} prompts."

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts,
            "prompt": self.prompt,
            "systems": {name: one.as_dict() for name, one in self.systems.items()},
            "single": self.single,
            "gains": {name: gain.as_dict() for name, gain in self.gains.items()},
            "only": dict(self.only),
            "composes": list(self.composes),
        }


def reads_as(text: str, language: str) -> bool:
    """Whether a text has function words of a language of ``STOP_WORDS``: more than of English, of no other fewer.

    A text without any of them, as a name alone, reads as no language.
    """
    words = words_of(text)
    counts = {name: sum(word in told.split() for word in words) for name, told in STOP_WORDS.items()}
    own = counts.pop(language)
    return own > 0 and own > counts.get("English", 0) and own >= max(counts.values())


def show_cases(
    ground: Ground, cases: Sequence[Showcase], *, output: str | os.PathLike[str], k: int = 3, max_new_tokens: int = 64
) -> tuple[ShownCase, ...]:
    """Ask every prompt of the base model, of its two adapters and of its k nearest ones alone, and of compositions.

    Args:
        output: folder of the run, which goes on where it was stopped.
        k: adapters that are retrieved for "mixture" and "fusion".

    Raises:
        ConfigurationError: no prompts, or one that stands in two showcases.
        AdapterNotFoundError: one of the two adapters is not registered.
        As ``run``.
    """
    asked = [(case, prompt) for case in cases for prompt in case.prompts]
    if not cases or not all(case.prompts for case in cases) or len({prompt for _, prompt in asked}) < len(asked):
        raise ConfigurationError(f"{len(cases)} showcases: expected one or more, of prompts that are all different")
    for case in cases:
        for name in (case.first, case.second):
            ground.hub.get(name, namespace=ground.namespace)
    # What is right is a matter of the checks, not of a metric and its target.
    questions = MixedSet(tuple(MixedRow(text, case.name, case.name, "showcase", _PLACEHOLDER) for case, text in asked))
    systems = _systems(ground, cases, k)
    results = run(ground, questions, systems, output=output, max_new_tokens={_PLACEHOLDER: max_new_tokens})
    answers = {(one.system, questions.rows[one.question].inputs): one for one in results.answers}
    return tuple(_shown(case, answers, [one.name for one in systems], ground.seed) for case in cases)


def _systems(ground: Ground, cases: Sequence[Showcase], k: int) -> list[RoutedSystem]:
    pairs = {prompt: (case.first, case.second) for case in cases for prompt in case.prompts}
    routing = Routing(k=k, namespace=ground.namespace)
    found = ground.hub.route([*pairs], base_model=ground.base_model, routing=routing)
    nearest = {
        prompt: tuple(member.adapter.name for member in route.members)
        for prompt, route in zip(pairs, found, strict=True)
    }
    alone = {name: _pinned("selection", pairs, place) for place, name in enumerate(ALONE)}
    alone |= {f"nearest {place + 1}": _pinned("selection", nearest, place) for place in range(k)}
    composed = {f"{strategy} of the two": _pinned(strategy, pairs) for strategy in ("mixture", "fusion")}
    composed |= {strategy: _pinned(strategy, nearest) for strategy in ("mixture", "fusion")}
    routed = {"base": _base, **alone, **composed}
    return [RoutedSystem(name, of) for name, of in routed.items()]


def _base(_: MixedRow) -> Routing:
    return Routing("base")


def _pinned(
    strategy: str, adapters: Mapping[str, tuple[str, ...]], place: int | None = None
) -> Callable[[MixedRow], Routing | None]:
    """By prompt its adapters, or the one at that place; None where there are not so many."""

    def of(row: MixedRow) -> Routing | None:
        names = adapters[row.inputs]
        if place is not None:
            names = names[place : place + 1]
        return Routing(strategy, adapters=names) if names else None

    return of


def _shown(case: Showcase, answers: Mapping[tuple[str, str], Answer], systems: Sequence[str], seed: int) -> ShownCase:
    """``answers``: by system and prompt."""
    texts = {name: [_text(answers.get((name, prompt))) for prompt in case.prompts] for name in systems}
    passed = {
        name: np.array(
            [
                [math.nan if text is None else 100.0 * check(prompt, text) for check in case.checks.values()]
                for prompt, text in zip(case.prompts, own, strict=True)
            ]
        )
        for name, own in texts.items()
    }
    right = {name: marks.min(axis=1) for name, marks in passed.items()}
    scores = Scores.of(
        {name: marks.tolist() for name, marks in right.items()}, [case.name] * len(case.prompts), seed=seed
    )
    singles = [name for name in systems if name not in COMPOSED and not np.isnan(right[name]).all()]
    none_alone = np.nanmax([right[name] for name in singles], axis=0) < 100
    shown = {}
    for name in systems:
        first = answers.get((name, case.prompts[0]))
        adapters = () if first is None or first.route is None else first.route["adapters"]
        shown[name] = Shown(
            dict(zip(case.checks, _means(passed[name]), strict=True)),
            scores.mean(name),
            tuple(one["name"] for one in adapters),
            _text(first) or "",
        )
    single = max(singles, key=lambda name: scores.mean(name).value)
    return ShownCase(
        case.name,
        len(case.prompts),
        case.prompts[0],
        shown,
        single,
        {name: scores.difference(name, single) for name in COMPOSED},
        {name: int(((right[name] == 100) & none_alone).sum()) for name in COMPOSED},
    )


def _text(answer: Answer | None) -> str | None:
    return None if answer is None else answer.text


def _means(marks: NDArray[np.float64]) -> list[float]:
    """Of each check, over the prompts that have an answer."""
    known = marks[~np.isnan(marks).any(axis=1)]
    return [math.nan] * marks.shape[1] if not len(known) else [float(mean) for mean in known.mean(axis=0)]
