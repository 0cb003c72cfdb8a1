"""Made-up neighbours for the adapters of a large pool: real rows of real tasks, each pool entry in wordings of its own.

A wording changes what an author of templates would choose, and the same way in every row: the verbs and nouns of the
instruction, the names of the fields, how options are listed, what stands around it all. The content stays as it is.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from lora_hub_sdk.retriever.tasks import Task

#: Wordings of a task, and the rows of each: 192 texts a task, and 286 ways to choose two or three wordings of 12.
WORDINGS: Final = 12
ROWS: Final = 16
_SAMPLES: Final = 20
#: A word in so many of a task's rows belongs to its template.
_TEMPLATE_SHARE: Final = 0.3

_WORD: Final = re.compile(r"\w+")
_LABEL: Final = re.compile(r"(?m)^([A-Z][a-z]{0,12}):")
_OPTIONS: Final = re.compile(r"\n+OPTIONS:\n(?P<options>(?:- .*\n?)+)")

_SAME: Final[Mapping[str, Sequence[str]]] = {
    "accomplish": ("reach", "achieve", "get to"),
    "answer": ("reply", "response", "solution"),
    "ask": ("call", "look"),
    "attributes": ("properties", "features", "facts"),
    "cause": ("reason", "origin"),
    "complete": ("finish", "fill in", "continue"),
    "data": ("facts", "records", "triples", "table"),
    "define": ("explain", "give the meaning of", "describe"),
    "describes": ("tells of", "covers", "expresses"),
    "description": ("text", "blurb", "notice"),
    "does": ("would", "can"),
    "effect": ("result", "consequence", "outcome"),
    "entail": ("imply", "support", "lead to"),
    "fact": ("statement", "claim"),
    "final": ("resulting", "last"),
    "generate": ("write", "produce", "compose"),
    "give": ("state", "return", "tell"),
    "goal": ("aim", "task", "objective"),
    "hypothesis": ("claim", "conclusion", "second sentence"),
    "kind": ("type", "sort", "category"),
    "mean": ("say", "express"),
    "meant": ("referred to", "intended"),
    "movie": ("film", "picture"),
    "negative": ("bad", "unfavourable", "critical"),
    "news": ("article", "story", "report"),
    "noun": ("word", "term"),
    "number": ("value", "figure"),
    "package": ("program", "tool"),
    "passage": ("text", "paragraph", "context"),
    "phrase": ("expression", "line"),
    "positive": ("good", "favourable", "approving"),
    "premise": ("text", "first sentence", "context"),
    "put": ("turn", "bring", "convert"),
    "question": ("query", "problem"),
    "rate": ("score", "judge", "mark"),
    "restaurant": ("place", "venue"),
    "review": ("opinion", "comment", "critique"),
    "same": ("identical", "equal"),
    "sentence": ("line", "utterance", "phrase"),
    "sentences": ("lines", "statements", "phrases"),
    "sentiment": ("tone", "attitude", "feeling", "polarity"),
    "short": ("brief", "concise"),
    "similar": ("alike", "close"),
    "software": ("computer", "program"),
    "summarise": ("condense", "shorten", "boil down"),
    "summary": ("line", "title", "caption"),
    "thing": ("content", "matter"),
    "topic": ("subject", "theme", "section"),
    "translate": ("render", "convert", "turn"),
    "tweet": ("post", "message"),
}
_LABELS: Final[Sequence[str]] = ("{}:", "{} -", "[{}]", "**{}**:", "<{}>", "{}\n", "## {}\n", "{} =", "({})")
_HEADS: Final = (
    "OPTIONS:", "Options:", "Choices:", "Choose from:", "Possible answers:", "Pick one of these.", "Available options:",
    "Select:", "Which of them?", "Candidates:", "The answer is one of:", "CHOICES",
)  # fmt: skip
_MARKS: Final = ("- {}", "* {}", "{n}. {}", "({a}) {}", "{A}) {}", "[{n}] {}", "• {}", "{A}: {}", "'{}'", "-- {}")
_BEFORE: Final = (
    "", "", "", "Please help with this. ", "Task: ", "### Instruction:\n", "User: ", "Input:\n", "Read carefully.\n\n",
    "Here is an exercise.\n", "Q: ", "You are an expert. ", "Consider this:\n", "<<<\n", "Dear assistant,\n",
    "Exercise. ", "Problem:\n", "[INST] ", "Quick one: ", "Instance\n---\n",
)  # fmt: skip
_AFTER: Final = (
    "", "", "", "\nAnswer:", "\n\n### Response:", "\nAssistant:", "\nOutput:", "\n\nBe brief.", "\nReply in one line.",
    "\nA:", "\nYour answer:", "\n\nThink before you answer.", "\n>>>", "\nThanks!", "\nSolution:", " [/INST]",
    "\nGive nothing but the answer.", "\n\nResult ->", "\nWhat do you say?", "\n---",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wording:
    """One author's choices: other words for the template's, a form of labels, options, and what stands around."""

    words: Mapping[str, str]
    label: str
    head: str
    mark: str
    before: str
    after: str
    options_first: bool
    lower: bool

    def __call__(self, text: str) -> str:
        """The text in this wording."""
        options = _OPTIONS.search(text)
        body = text[: options.start()] + text[options.end() :] if options else text
        body = _LABEL.sub(lambda label: self.label.format(self._other(label[1])), body)
        body = self._changed(body)
        if options:
            listed = self._listed(options["options"])
            body = f"{listed}\n\n{body.strip()}" if self.options_first else f"{body.rstrip()}\n\n{listed}"
        whole = f"{self.before}{body.strip()}{self.after}".strip()
        return whole.lower() if self.lower else whole

    def _changed(self, text: str) -> str:
        return _WORD.sub(lambda word: self._other(word[0]), text)

    def _other(self, word: str) -> str:
        other = self.words.get(word.lower(), word)
        return other[:1].upper() + other[1:] if word[:1].isupper() else other

    def _listed(self, options: str) -> str:
        lines = [self._changed(line.removeprefix("- ")) for line in options.strip().split("\n")]
        letters = "abcdefghijklmnopqrstuvwxyz"
        marked = [
            self.mark.format(line, n=place + 1, a=letters[place % 26], A=letters[place % 26].upper())
            for place, line in enumerate(lines)
        ]
        return "\n".join([self.head, *marked])


def draw_wording(template: Sequence[str], draw: random.Random) -> Wording:
    """A wording for a task whose template has these words; about half of those that have others get another one."""
    changed = [word for word in sorted(template) if word in _SAME and draw.random() < 0.5]
    return Wording(
        words={word: draw.choice(_SAME[word]) for word in changed},
        label=draw.choice(_LABELS),
        head=draw.choice(_HEADS),
        mark=draw.choice(_MARKS),
        before=draw.choice(_BEFORE),
        after=draw.choice(_AFTER),
        options_first=draw.random() < 0.3,
        lower=draw.random() < 0.15,
    )


def template_words(rows: Sequence[str]) -> list[str]:
    """The words that stand in many of a task's rows."""
    seen = Counter(word for row in rows for word in set(_WORD.findall(row.lower())))
    return [word for word, count in seen.items() if count >= _TEMPLATE_SHARE * len(rows)]


@dataclass(frozen=True, slots=True)
class Distractors:
    """Texts by (source task, wording), and adapters that each draw 20 from two or three wordings of one task.

    No two adapters have the same task and the same wordings. Those that share a wording share some texts.
    """

    texts: Mapping[tuple[str, int], Sequence[str]]
    domains: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def all_texts(self) -> list[str]:
        """Every text that any adapter can draw."""
        return [text for part in self.texts.values() for text in part]

    @property
    def most(self) -> int:
        """How many adapters there can be."""
        return len(self._choices())

    def adapters(self, count: int, seed: int) -> list[Task]:
        """Adapters named "<source task>~<number>", as many as asked for, drawn at random."""
        draw = random.Random(f"{self.seed} {seed}")
        chosen = draw.sample(self._choices(), count)
        return [self._adapter(place, *choice, draw) for place, choice in enumerate(chosen)]

    def _choices(self) -> list[tuple[str, tuple[int, ...]]]:
        wordings: dict[str, list[int]] = {}
        for task, number in self.texts:
            wordings.setdefault(task, []).append(number)
        return [(task, some) for task, all_ in wordings.items() for n in (2, 3) for some in combinations(all_, n)]

    def _adapter(self, place: int, task: str, wordings: tuple[int, ...], draw: random.Random) -> Task:
        shares = [_SAMPLES // len(wordings) + (n < _SAMPLES % len(wordings)) for n in range(len(wordings))]
        drawn = [
            text
            for number, share in zip(wordings, shares, strict=True)
            for text in draw.sample(self.texts[task, number], min(share, len(self.texts[task, number])))
        ]
        return Task(f"{task}~{place}", tuple(drawn), self.domains.get(task))


def distractors(
    rows: Mapping[str, Sequence[str]],
    domains: Mapping[str, str],
    *,
    wordings: int = WORDINGS,
    per_wording: int = ROWS,
    seed: int = 0,
) -> Distractors:
    """Reworded rows; each row is used once, so that two wordings of a task share no content."""
    texts: dict[tuple[str, int], Sequence[str]] = {}
    for task, all_rows in rows.items():
        draw = random.Random(f"{seed} {task}")
        template = template_words(all_rows)
        drawn = draw.sample(list(all_rows), min(len(all_rows), wordings * per_wording))
        for number in range(wordings):
            wording = draw_wording(template, draw)
            part = drawn[number * per_wording : (number + 1) * per_wording]
            texts[task, number] = [wording(row) for row in part]
    return Distractors(texts, domains, seed)


def source_of(name: str) -> str:
    """The task that an adapter is for: its own name, or what its rows were taken from."""
    return name.partition("~")[0]


def shared_texts(adapters: Sequence[Task], pairs: int = 20_000, seed: int = 0) -> float:
    """Mean share of texts that two adapters of one source task have in common, over random pairs."""
    by_task: dict[str, list[frozenset[str]]] = {}
    for adapter in adapters:
        by_task.setdefault(source_of(adapter.name), []).append(frozenset(adapter.inputs))
    groups = [group for group in by_task.values() if len(group) > 1]
    if not groups:
        return 0.0
    draw = random.Random(seed)
    total = 0.0
    for _ in range(pairs):
        one, other = draw.sample(draw.choice(groups), 2)
        total += len(one & other) / min(len(one), len(other))
    return total / pairs
