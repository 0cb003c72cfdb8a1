"""How good one answer is: exact match, ROUGE, BLEU and token F1, each in percent."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final

from lora_hub_sdk.errors import ConfigurationError, MissingExtraError

_ARTICLES: Final = frozenset({"a", "an", "the"})
#: Scripts that are written without spaces (kana, Han, Thai, Lao, Burmese, Khmer): each character is a word.
_UNSPACED: Final = re.compile(
    "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"
)


@dataclass(frozen=True, slots=True)
class Metric:
    """``of(answer, target)`` is in percent, 0 to 100. ``companions`` are told beside it, itself among them."""

    name: str
    of: Callable[[str, str], float]
    companions: tuple[str, ...]


def score(metric: str, answer: str, target: str) -> float:
    """How good an answer is, in percent; higher is better.

    Raises:
        ConfigurationError: no metric has that name.
        MissingExtraError: rouge-score or sacrebleu is not installed.
    """
    return _known(metric).of(answer, target)


def scores(metric: str, answer: str, target: str) -> dict[str, float]:
    """What is told of an answer under a metric, by name, in percent: for "rouge" it is ROUGE-1, 2 and L.

    Raises:
        As ``score``.
    """
    return {name: METRICS[name].of(answer, target) for name in _known(metric).companions}


def corpus_bleu(answers: Sequence[str], targets: Sequence[str]) -> float:
    """BLEU of all answers together (sacrebleu, tokenizer 13a), in percent; NaN where there are none.

    Raises:
        ConfigurationError: not as many answers as targets.
        MissingExtraError: sacrebleu is not installed.
    """
    if len(answers) != len(targets):
        raise ConfigurationError(f"{len(answers)} answers for {len(targets)} targets: expected one for each")
    if not answers:
        return float("nan")
    return float(_bleu(effective_order=False).corpus_score(list(answers), [list(targets)]).score)


def normalised(text: str) -> str:
    """A text as exact match sees it: no case, no punctuation, no English article, single spaces.

    This is SQuAD's normalisation, as T5 and Flan use it, for all of Unicode, with two changes. The sign and the point
    of a number stay. And nothing becomes empty: a text of articles only keeps them (the choice "A"), and one of
    punctuation only stays as it is.
    """
    folded = _folded(text)
    words = _without_punctuation(folded).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words or folded.split())


def words_of(text: str) -> list[str]:
    """The words of a text, without case: runs of letters, marks and digits of any script.

    For ASCII these are rouge-score's own, which drops all other letters. Characters of scripts that are written
    without spaces, as Chinese and Japanese, are words of their own.
    """
    kept = (character if unicodedata.category(character)[0] in "LMN" else " " for character in _folded(text))
    return _UNSPACED.sub(r" \1 ", "".join(kept)).split()


def _exact_match(answer: str, target: str) -> float:
    return 100.0 * (normalised(answer) == normalised(target))


def _f1(answer: str, target: str) -> float:
    """SQuAD's: the harmonic mean of the shares of words that are shared, words counted as often as they come."""
    given, wanted = (_UNSPACED.sub(r" \1 ", normalised(text)).split() for text in (answer, target))
    if not given or not wanted:
        return 100.0 * (given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 200.0 * shared / (len(given) + len(wanted))


def _rouge(kind: str) -> Callable[[str, str], float]:
    """The F-measure of rouge-score, without stemming. Answers of the wanted words have 100, also where ROUGE-2 has no
    pair of words to count."""

    def of(answer: str, target: str) -> float:
        given, wanted = words_of(answer), words_of(target)
        if not given or not wanted:
            return _exact_match(answer, target)
        return 100.0 if given == wanted else 100.0 * float(_rouge_scorer().score(target, answer)[kind].fmeasure)

    return of


def _sentence_bleu(answer: str, target: str) -> float:
    """sacrebleu's of one sentence: tokenizer 13a, case kept, "exp" smoothing, n-grams up to what the sentence has.

    13a splits at spaces and ASCII punctuation only: a Chinese or Japanese sentence is one word, right or wrong as a
    whole. For such targets "rouge1" and "f1", which count characters, tell more.
    """
    if not answer.strip() or not target.strip():
        return 100.0 * (answer.strip() == target.strip())
    # Rounding brings a perfect sentence a little above 100.
    return min(100.0, float(_bleu(effective_order=True).sentence_score(answer, [target]).score))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def _without_punctuation(text: str) -> str:
    text, kept = text.replace("\u2212", "-"), list[str]()
    for place, character in enumerate(text):
        before, after = kept[-1] if kept else " ", text[place + 1 : place + 3]
        if not _is_punctuation(character) or _is_of_a_number(character, before, after):
            kept.append(character)
    return unicodedata.normalize("NFC", "".join(kept))


def _is_of_a_number(character: str, before: str, after: str) -> bool:
    """Whether it is a sign or a point that the number changes without: 3.5 is not 35, -2 not 2, .5 not 5."""
    if character == ".":
        return after[:1].isdecimal() and (before.isspace() or before.isdecimal() or before == "-")
    return character == "-" and before.isspace() and after.removeprefix(".")[:1].isdecimal()


def _is_punctuation(character: str) -> bool:
    """Of ASCII what SQuAD drops; beyond it marks, quotes and signs of currencies, but no other symbols."""
    category = unicodedata.category(character)
    return character in string.punctuation or category[0] == "P" or category in ("Sc", "Sk")


def _known(metric: str) -> Metric:
    try:
        return METRICS[metric]
    except (KeyError, TypeError):
        raise ConfigurationError(f"metric {metric!r} is unknown; known metrics are {', '.join(METRICS)}") from None


class _Words:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words_of(text)


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("ROUGE", "evaluation") from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False, tokenizer=_Words())


@cache
def _bleu(*, effective_order: bool) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtraError("BLEU", "evaluation") from error
    return BLEU(tokenize="13a", effective_order=effective_order)


_ROUGES: Final = ("rouge1", "rouge2", "rougeL")
#: What a row's ``metric`` may be. "rouge" is ROUGE-L.
METRICS: Final[Mapping[str, Metric]] = MappingProxyType(
    {
        "em": Metric("em", _exact_match, ("em",)),
        **{kind: Metric(kind, _rouge(kind), _ROUGES) for kind in _ROUGES},
        "rouge": Metric("rougeL", _rouge("rougeL"), _ROUGES),
        "bleu": Metric("bleu", _sentence_bleu, ("bleu",)),
        "f1": Metric("f1", _f1, ("f1",)),
    }
)
