from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import _zoo, showcases
from lora_hub_sdk.evaluation.mixed_set import MixedRow


def row_of(inputs: str, targets: str) -> MixedRow:
    return MixedRow(inputs, targets, "task", "domain", "rouge")


def passed(checks: object, answer: str) -> list[str]:
    assert isinstance(checks, dict)
    return [name for name, check in checks.items() if check("", answer)]


def test_a_description_has_half_of_the_names_and_is_in_spanish() -> None:
    checks = showcases._described(
        row_of('Describe: Ajoblanco, region, "Andalusia"; Ajoblanco, course, soup; Ajoblanco, year, 1900', "...")
    )
    assert passed(checks, "El Ajoblanco es un plato de la región de Andalusia.") == ["Spanish", "facts"]
    assert passed(checks, "Ajoblanco is a dish from Andalusia.") == ["facts"]
    assert passed(checks, "El plato es de la región.") == ["Spanish"]


def test_a_summary_is_french_short_and_of_the_right_thing() -> None:
    checks = showcases._summarised(row_of("...", "JACK audio plugins for VLC"))
    assert passed(checks, "greffons audio pour VLC") == ["French", "short", "about it"]
    assert passed(checks, "audio plugins for VLC") == ["short", "about it"]
    assert "short" not in passed(checks, "le " * 21)
    assert "short" not in passed(checks, "")


def test_a_summary_without_a_name_cannot_be_checked() -> None:
    assert showcases._summarised(row_of("...", "Simple text editor")) is None


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        ("positiv", ["German", "label"]),
        ("Positiv.", ["German", "label"]),
        ("negativ", ["German"]),
        ("positive", ["label"]),
        ("positiv, negativ", ["German"]),
        ("Dieser Satz ist gut", []),
    ],
)
def test_a_judgement_is_the_german_word_and_the_right_one(answer: str, done: list[str]) -> None:
    assert passed(showcases._judged(row_of("...", "positive")), answer) == done


def test_three_kinds_of_prompts_come_from_test_rows_with_an_order_below(shared: Path) -> None:
    cases = showcases.showcases(5)
    assert len(cases) == 3
    for case in cases:
        asked = {row.inputs for row in _zoo.zoo_questions([case.first], 1000).rows}
        assert len(case.prompts) == 5
        assert {prompt.rpartition("\n\n")[0] for prompt in case.prompts} <= asked
        assert all(not check(prompt, "") for prompt in case.prompts for check in case.checks.values())


def test_it_is_skipped_where_there_is_no_zoo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_zoo, "ADAPTERS", tmp_path / "none")
    showcases.main(["--output", str(tmp_path / "run")])
    assert "skipped" in capsys.readouterr().out
