"""The report of a made-up run: its numbers by hand, and pages that GitHub can show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from markdown_it import MarkdownIt

from lora_hub_sdk.errors import ConfigurationError
from lora_hub_sdk.evaluation.answers import Answer, AnswerFile
from lora_hub_sdk.evaluation.metrics import corpus_bleu, scores
from lora_hub_sdk.evaluation.mixed_set import MixedRow, MixedSet
from lora_hub_sdk.evaluation.record import RunRecord, SystemRecord
from lora_hub_sdk.evaluation.report import Report, make_report
from lora_hub_sdk.evaluation.results import Results, write_questions
from lora_hub_sdk.types import MemberDict, RouteDict

SPEC = {
    "french": ("translation | both", "bleu", "the cat sat on the mat today"),
    "dutch": ("translation | both", "bleu", "a dog ran over the green field"),
    "short": ("summary", "rouge", "rain falls on the town"),
    "mood": ("feeling", "em", "good"),
}
QUESTIONS = MixedSet(
    tuple(
        MixedRow(f"{task} {n}?", target, task, domain, metric)
        for n in range(6)
        for task, (domain, metric, target) in SPEC.items()
    )
)
OWN = {"french": "fr", "dutch": "nl", "short": "sum"}
#: How many words of each target a system's answers have, by the number of the question in its task.
WORDS = {
    "base": [0, 1, 1, 2, 0, 0],
    "perfect": [9, 9, 9, 9, 4, 9],
    "selection": [9, 9, 3, 9, 4, 9],
    "mixture": [9, 9, 4, 4, 9, 9],
    "selection-ood": [2, 3, 2, 2, 3, 1],
    "mixture-ood": [4, 3, 4, 5, 3, 4],
    "smear": [3, 3, 2, 9, 9, 2],
}


def route(*names: str) -> RouteDict:
    members: list[MemberDict] = [
        {"name": name, "repo_id": "r", "revision": "0", "score": 0.5, "weight": 1 / len(names)} for name in names
    ]
    return {"strategy": "mixture", "adapters": members}


def answer(system: str, place: int) -> Answer:
    row = QUESTIONS.rows[place]
    blank = Answer(system, place, row.task, row.domain, row.metric)
    if system == "perfect" and row.task not in OWN:
        return blank
    text = " ".join(row.targets.split()[: WORDS[system][place // len(SPEC)]])
    found = scores(row.metric, text, row.targets)
    members = {"base": (), "mixture": ("fr", "sum")}.get(
        system, ("nl",) if "ood" in system else (OWN.get(row.task, "fr"),)
    )
    value = found["rougeL" if row.metric == "rouge" else row.metric]
    return Answer(
        system, place, row.task, row.domain, row.metric, text, value, found, route(*members), "key", "stop", 3
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("made-up")
    systems = {name: SystemRecord(True, name == "smear", 1.5 * (name == "smear"), 0.25) for name in reversed(WORDS)}
    about = {"questions": QUESTIONS.digest, "base model": "some/base", "number format": "float32", "device": "cpu"}
    told = {"date": "1 May", "command": "bench `a` ``b``"}
    RunRecord(about, "", 3, OWN, systems, told, {"arrow": "no | adapters"}, 12.0, 90, 400).write(folder)
    write_questions(QUESTIONS, folder)
    with AnswerFile(folder) as file:
        file.append(answer(name, place) for name in WORDS for place in range(len(QUESTIONS)))
        first = answer("smear", 0)
        file.append([Answer("smear", 0, first.task, first.domain, first.metric, error="AdmissionError: no")])
    return Results.read(folder)


@pytest.fixture(scope="module")
def report(results: Results) -> Report:
    return make_report(results)


def by_task(system: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for place in range(len(QUESTIONS)):
        one = answer(system, place)
        if one.score is not None and (system, place) != ("smear", 0):
            found.setdefault(one.task, []).append(one.score)
    return found


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page as GitHub's parser reads them: rows of cells."""
    found: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(page):
        if token.type in ("table_open", "table_close"):
            inside = token.type == "table_open"
            found += [[]] if inside else []
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and inside:
            found[-1][-1].append(token.content)
    return found


def test_means_are_those_of_the_tasks_means(report: Report) -> None:
    assert [one.name for one in report.systems] == [
        "base", "perfect", "selection", "mixture", "selection-ood", "mixture-ood", "smear"
    ]  # fmt: skip
    for one in report.systems:
        want = {task: fmean(values) for task, values in by_task(one.name).items()}
        assert {task: found.value for task, found in one.tasks.items() if not math.isnan(found.value)} == pytest.approx(
            want
        )
        assert one.overall.value == pytest.approx(fmean(want.values()))
        assert one.domains["translation | both"].value == pytest.approx(fmean([want["french"], want["dutch"]]))
        assert one.overall.low <= one.overall.value <= one.overall.high


def test_ratios_are_over_the_questions_that_both_answered(report: Report) -> None:
    found = {one.name: one for one in report.systems}
    mixture, perfect = by_task("mixture"), by_task("perfect")
    shared = [task for task in mixture if task in perfect]
    want = fmean(fmean(mixture[task]) for task in shared) / fmean(fmean(perfect[task]) for task in shared)
    assert found["mixture"].to_perfect.value == pytest.approx(want)
    assert found["mixture"].reference == "perfect"
    unseen = {name: fmean(map(fmean, by_task(name).values())) for name in ("mixture-ood", "selection-ood")}
    assert found["mixture-ood"].reference == "selection-ood"
    assert found["mixture-ood"].to_reference.value == pytest.approx(unseen["mixture-ood"] / unseen["selection-ood"])
    assert {one.name: one.group for one in report.systems if one.name in ("base", "smear")} == {
        "base": "reference",
        "smear": "learned",
    }


def test_counts_and_shares_are_told(report: Report) -> None:
    found = {one.name: one for one in report.systems}
    perfect, smear = found["perfect"], found["smear"]
    assert (perfect.answered, perfect.without, perfect.errors, perfect.missing) == (18, 6, 0, 0)
    assert (smear.answered, smear.errors) == (23, 1)
    assert (found["base"].adapters, found["mixture"].adapters) == (0, 2)
    assert (found["base"].own, perfect.own, found["mixture-ood"].own) == (0, 1, 1 / 3)
    assert found["mixture"].own == pytest.approx(2 / 3)


def test_companions_are_means_over_tasks_and_bleu_is_the_corpus(report: Report) -> None:
    mixture = next(one for one in report.systems if one.name == "mixture")
    ones = [answer("mixture", place) for place in range(len(QUESTIONS))]
    for kind in ("rouge1", "rouge2", "rougeL"):
        assert mixture.companions[kind] == pytest.approx(fmean(one.scores[kind] for one in ones if one.task == "short"))
    corpora = [
        corpus_bleu([one.text or "" for one in ones if one.task == task], [SPEC[task][2]] * 6)
        for task in ("french", "dutch")
    ]
    assert mixture.companions["corpus BLEU"] == pytest.approx(fmean(corpora))


def test_the_page_has_every_table_with_whole_rows(report: Report) -> None:
    page = report.markdown()
    clusters, groups, tasks, companions, times = tables(page)
    for table in (clusters, groups, tasks, companions, times):
        assert {len(row) for row in table} == {len(table[0])}
    assert clusters[0] == ["system", "feeling", "summary", "translation | both", "overall", "to perfect"]
    assert [row[0] for row in clusters[1:]] == [f"`{one.name}`" for one in report.systems]
    perfect = next(row for row in clusters if row[0] == "`perfect`")
    assert perfect[1] == "-"
    assert float(perfect[4].split()[0]) == pytest.approx(fmean(map(fmean, by_task("perfect").values())), abs=0.05)
    assert [row[0] for row in tasks[1:]] == ["mood", "short", "dutch", "french"]
    assert len(tasks[0]) == 3 + len(report.systems)
    assert [row[1] for row in groups[1:]] == [
        "`base`", "`perfect`", "`selection`", "`mixture`", "`smear`", "`selection-ood`", "`mixture-ood`"
    ]  # fmt: skip
    assert "`smear` 1.\n" in page
    assert "- `arrow`: no \\| adapters" in page
    assert "- command: ``` bench `a` ``b`` ```" in page
    assert "24 questions of 4 tasks in 3 clusters, 3 adapters, 7 systems." in page
    assert "`perfect` 18, `smear` 23; their means" in page
    assert all(sentence in page for sentence in report.recommendation.sentences())


def test_the_same_answers_give_the_same_report(results: Results, report: Report, tmp_path: Path) -> None:
    page, data = report.write(tmp_path)
    first = page.read_bytes(), data.read_bytes()
    make_report(Results.read(results.folder)).write(tmp_path)
    assert (page.read_bytes(), data.read_bytes()) == first
    told: dict[str, Any] = json.loads(data.read_text("utf-8"))
    assert told["systems"][1]["tasks"]["mood"] == {"value": None, "low": None, "high": None}
    assert told["told"]["date"] == "1 May"
    assert page.read_text("utf-8") == report.markdown()


def test_some_systems_can_be_chosen_and_keep_what_they_are_held_against(results: Results, report: Report) -> None:
    few = make_report(results, systems=["mixture", "mixture-ood"], told={"date": "2 May"})
    assert [one.name for one in few.systems] == ["mixture", "mixture-ood"]
    whole = {one.name: one for one in report.systems}
    for one in few.systems:
        assert one == whole[one.name]
    assert (few.told["date"], few.told["command"]) == ("2 May", report.told["command"])
    with pytest.raises(ConfigurationError, match=r"has answers of smear, .*base"):
        make_report(results, systems=["arrow"])


def test_a_run_that_is_not_complete_says_so(results: Results) -> None:
    part = tuple(one for one in results.answers if one.question > 3 or one.system != "mixture")
    page = make_report(Results(results.folder, results.questions, part, results.record)).markdown()
    assert "**The run is not complete**; not asked yet: `mixture` 4." in page


def test_a_folder_that_is_no_run_or_was_changed_is_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no record of a run"):
        Results.read(tmp_path)
    results.record.write(tmp_path)
    with pytest.raises(ConfigurationError, match="questions of the run cannot be read"):
        Results.read(tmp_path)
    write_questions(MixedSet(QUESTIONS.rows[1:]), tmp_path)
    with pytest.raises(ConfigurationError, match="changed after the run"):
        Results.read(tmp_path)
