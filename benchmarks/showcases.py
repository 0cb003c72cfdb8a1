"""Prompts that need two adapters together, on the zoo: what a mixture does that none of its adapters does alone.

A prompt is a test question of one task, and below it another task's order: "Translate to Spanish". No wording was tried
out; each kind is asked by 20 prompts, and the checks below say what is right before anything is asked.

- describe in Spanish: Spanish by its function words, and half of the data's names and numbers as they are.
- summarise in French: French by its function words, at most 20 words, and one of the names that the summary wants.
- judge in German: "positiv" or "negativ" as the sentence is, and neither the other one nor the English words.

    python -m benchmarks.showcases --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks._zoo import zoo_folders, zoo_questions
from benchmarks.mixed import zoo_ground
from lora_hub_sdk import ModelSettings
from lora_hub_sdk.evaluation.metrics import words_of
from lora_hub_sdk.evaluation.mixed_set import MixedRow
from lora_hub_sdk.evaluation.showcases import Check, Showcase, ShownCase, reads_as, show_cases

_PROMPTS: Final = 20
_LONGEST_SUMMARY: Final = 20
#: A triple of the data: subject, property, object.
_TRIPLE: Final = re.compile(r"([^,;]+), [^,;]+, ([^;]+)")
_GERMAN: Final = {"positive": "positiv", "negative": "negativ"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    cases = showcases(options.prompts, options.seed)
    if not {name for case in cases for name in (case.first, case.second)} <= zoo_folders().keys() or not cases:
        print("skipped: the adapters and their tasks' rows are not beside this checkout")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    settings = ModelSettings(options.dtype)
    with zoo_ground(options.output, (), settings, seed=options.seed, progress=not options.json) as ground:
        shown = show_cases(ground, cases, output=options.output, k=options.k)
    if options.json:
        print(json.dumps({case.name: case.as_dict() for case in shown}, ensure_ascii=False))
    else:
        show(shown)


def showcases(prompts: int = _PROMPTS, seed: int = 0) -> tuple[Showcase, ...]:
    """The three kinds, each of that many prompts; none where the zoo is not there."""
    if not zoo_folders():
        return ()
    kinds: tuple[tuple[str, str, str, str, Callable[[MixedRow], dict[str, Check] | None]], ...] = (
        ("describe in Spanish", "web_nlg_en", "tatoeba_enes", "Translate to Spanish", _described),
        ("summarise in French", "ddtp_summarise", "ddtp_enfr", "Translate to French", _summarised),
        ("judge in German", "uci_sentences", "tatoeba_deen", "Translate to German", _judged),
    )
    return tuple(_case(*kind, prompts, seed) for kind in kinds)


def show(cases: Sequence[ShownCase]) -> None:
    """Print what came out of each kind, a table, and the answers to its first prompt."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for case in cases:
        table = Table(
            "system", *next(iter(case.systems.values())).passed, "all of it", "only this", "to the first prompt"
        )
        for name, one in case.systems.items():
            shares = ["-" if math.isnan(share) else f"{share:.0f} %" for share in one.passed.values()]
            right = "-" if math.isnan(one.right.value) else f"{one.right.value:.0f} %"
            table.add_row(
                name, *shares, right, str(case.only.get(name, "")), escape(f"{', '.join(one.adapters)}: {one.answer}")
            )
        console.print(f"\n{case.sentence()}\n\n{case.prompt}\n", markup=False, highlight=False)
        console.print(table)


def _case(
    name: str,
    task: str,
    other: str,
    order: str,
    checks_of: Callable[[MixedRow], dict[str, Check] | None],
    prompts: int,
    seed: int,
) -> Showcase:
    """Questions whose row gives nothing to check by are passed over."""
    checks: dict[str, dict[str, Check]] = {}
    for row in zoo_questions([task], 10**6, seed).rows:
        found = checks_of(row)
        if found is not None and len(checks) < prompts:
            checks[f"{row.inputs}\n\n{order}"] = found

    def by_prompt(check: str, prompt: str, answer: str) -> bool:
        return checks[prompt][check](prompt, answer)

    names = next(iter(checks.values()))
    return Showcase(name, tuple(checks), task, other, {check: partial(by_prompt, check) for check in names})


def _described(row: MixedRow) -> dict[str, Check] | None:
    data = row.inputs.partition(":")[2]
    told = {end.strip(' "').replace("_", " ") for triple in _TRIPLE.findall(data) for end in triple}
    names = [text for text in sorted(told) if re.search(r"[A-Z0-9]", text)]
    if not names:
        return None

    def facts(_: str, answer: str) -> bool:
        said = sum(name.casefold() in answer.casefold() for name in names)
        return 2 * said >= len(names)

    return {"Spanish": _reads_as("Spanish"), "facts": facts}


def _summarised(row: MixedRow) -> dict[str, Check] | None:
    # A capital letter after the first, or a digit, marks a name, which no translation changes.
    names = {word.casefold() for word in re.findall(r"\w+", row.targets) if re.search(r"\w[A-Z]|[0-9]", word)}
    if not names:
        return None

    def short(_: str, answer: str) -> bool:
        return 0 < len(words_of(answer)) <= _LONGEST_SUMMARY

    def about(_: str, answer: str) -> bool:
        return not names.isdisjoint(words_of(answer))

    return {"French": _reads_as("French"), "short": short, "about it": about}


def _judged(row: MixedRow) -> dict[str, Check] | None:
    wanted = _GERMAN[row.targets]

    def label(_: str, answer: str) -> bool:
        said = {word[:7] for word in words_of(answer) if word[:7] in ("positiv", "negativ")}
        return said == {wanted}

    def german(_: str, answer: str) -> bool:
        words = {*words_of(answer)}
        return not words.isdisjoint(_GERMAN.values()) and words.isdisjoint(_GERMAN)

    return {"German": german, "label": label}


def _reads_as(language: str) -> Check:
    def check(_: str, answer: str) -> bool:
        return reads_as(answer, language)

    return check


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.showcases", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new, or one to go on with")
    parser.add_argument("--prompts", type=int, default=_PROMPTS, help="of each kind")
    parser.add_argument("-k", type=int, default=3, help="adapters that are retrieved")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


if __name__ == "__main__":
    main()
