from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_hub_sdk.errors import AdapterNotFoundError, ConfigurationError
from lora_hub_sdk.evaluation.answers import Answer
from lora_hub_sdk.evaluation.showcases import ALONE, COMPOSED, Showcase, _shown, reads_as, show_cases
from tests.evaluation.pool import Pool, make_pool

SYSTEMS = ("base", *ALONE, "nearest 1", *COMPOSED)


@pytest.fixture(scope="module")
def pool(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = make_pool(tmp_path_factory.mktemp("pool"), base)
    yield made
    made.hub.close()


def answers_of(right: dict[str, list[bool]]) -> dict[tuple[str, str], Answer]:
    return {
        (name, str(place)): Answer(name, place, "case", "showcase", "f1", "yes" if mark else "no")
        for name, marks in right.items()
        for place, mark in enumerate(marks)
    }


def case_of(prompts: int) -> Showcase:
    checks = {"yes": lambda prompt, answer: answer == "yes", "any": lambda prompt, answer: True}
    return Showcase("case", tuple(map(str, range(prompts))), "one", "two", checks)


def test_every_system_answers_and_tells_its_adapters(pool: Pool, tmp_path: Path) -> None:
    case = Showcase(
        "both",
        ("Translate the past tense of wind to French", "Translate the past tense of house to French"),
        "past",
        "french",
        {"some": lambda prompt, answer: bool(answer), "long": lambda prompt, answer: len(answer) > len(prompt)},
    )
    (shown,) = show_cases(pool.ground(tmp_path), [case], output=tmp_path / "run", k=2, max_new_tokens=4)
    assert [*shown.systems] == ["base", *ALONE, "nearest 1", "nearest 2", *COMPOSED]
    adapters = {name: one.adapters for name, one in shown.systems.items()}
    assert adapters["base"] == ()
    assert [adapters[name] for name in ALONE] == [("past",), ("french",)]
    assert {*adapters["fusion of the two"]} == {"past", "french"}
    assert adapters["mixture"] == (*adapters["nearest 1"], *adapters["nearest 2"])
    assert shown.prompt == case.prompts[0]
    assert all(set(one.passed) == {"some", "long"} for one in shown.systems.values())


def test_a_composition_does_it_where_it_is_right_and_no_adapter_alone_is() -> None:
    right = {name: [False] * 20 for name in SYSTEMS}
    right["first alone"] = [True] * 4 + [False] * 16
    right["mixture"] = [False] * 2 + [True] * 18
    shown = _shown(case_of(20), answers_of(right), SYSTEMS, seed=0)
    assert shown.composes == ("mixture",)
    assert (shown.single, shown.only["mixture"]) == ("first alone", 16)
    assert shown.gains["mixture"].value == pytest.approx(70)
    assert shown.systems["mixture"].passed == {"yes": 90, "any": 100}
    assert "yes. 90 % (mixture) against 20 % (first alone)" in shown.sentence()


def test_one_prompt_more_is_no_proof() -> None:
    right = {name: [False] * 20 for name in SYSTEMS}
    right["fusion"] = [True] + [False] * 19
    shown = _shown(case_of(20), answers_of(right), SYSTEMS, seed=0)
    assert shown.composes == ()
    assert "not at this size" in shown.sentence()
    assert "5 % (fusion)" in shown.sentence()


@pytest.mark.parametrize(("prompts", "composes"), [(3, ()), (20, ("mixture",))])
def test_what_comes_out_the_same_for_all_of_many_prompts_is_proof(prompts: int, composes: tuple[str, ...]) -> None:
    right = {name: [name == "mixture"] * prompts for name in SYSTEMS}
    shown = _shown(case_of(prompts), answers_of(right), SYSTEMS, seed=0)
    assert not shown.gains["mixture"].is_known
    assert shown.composes == composes


def test_an_answer_that_is_missing_counts_for_nobody() -> None:
    right = {name: [True] * 8 for name in SYSTEMS}
    answers = answers_of(right)
    answers["nearest 1", "0"] = replace(answers["nearest 1", "0"], text=None)
    del answers["base", "1"]
    shown = _shown(case_of(8), answers, SYSTEMS, seed=0)
    assert shown.systems["nearest 1"].right.value == 100
    assert shown.systems["nearest 1"].passed["yes"] == 100
    assert not any(math.isnan(gain.value) for gain in shown.gains.values())


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Le restaurant est dans le centre de la ville.", "French"),
        ("El restaurante está en el centro de la ciudad.", "Spanish"),
        ("Das Restaurant ist nicht im Zentrum der Stadt.", "German"),
        ("Il ristorante è nel centro della città.", "Italian"),
        ("The restaurant is in the centre of the city.", "English"),
    ],
)
def test_a_sentence_reads_as_its_own_language_only(text: str, language: str) -> None:
    assert [name for name in ("English", "French", "German", "Italian", "Spanish") if reads_as(text, name)] == [
        language
    ]


@pytest.mark.parametrize("text", ["", "Verona 39371", "The city of la Paz"])
def test_names_alone_and_english_are_not_spanish(text: str) -> None:
    assert not reads_as(text, "Spanish")


def test_it_refuses_no_prompts_the_same_prompt_twice_and_unknown_adapters(pool: Pool, tmp_path: Path) -> None:
    ground, case = pool.ground(tmp_path), replace(case_of(2), first="past", second="french")
    for cases in ([], [replace(case, prompts=())], [case, replace(case, name="again")]):
        with pytest.raises(ConfigurationError, match="expected one or more"):
            show_cases(ground, cases, output=tmp_path / "run")
    with pytest.raises(AdapterNotFoundError, match="nobody"):
        show_cases(ground, [replace(case, second="nobody")], output=tmp_path / "run")
