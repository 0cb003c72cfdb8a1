"""The retriever benchmark on a handful of made-up tasks: its report has the promised shape and its parts agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import _retriever_data as data
from benchmarks._retriever_data import Material, material
from benchmarks._retriever_effort import QUICK
from benchmarks._retriever_lab import KeptEncoder, Lab, Matrix
from benchmarks._retriever_score import accuracy, ranks
from benchmarks._retriever_wordings import Distractors, distractors, shared_texts, source_of
from benchmarks.retriever import PARTS, Data, Report, main, measure, show
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.retriever.questions import Question
from lora_hub_sdk.retriever.tasks import Task
from lora_hub_sdk.retriever.trainer import RetrieverTrainer

TEMPLATES = {
    "translate": "Translate this sentence to French: the {} is here.",
    "sentiment": "Is the sentiment of this review positive or negative?\nThe {}.\n\nOPTIONS:\n- positive\n- negative",
    "define": "Define the noun '{}' in one short phrase.",
    "count": "Question: how many letters are in {}?\nGive only the final number.",
    "summarise": "Summarise this passage in one line:\nA {} was seen by many.",
    "rhyme": "Find a rhyme for the word {}.",
}
WORDS = [first + last for first in ("sun", "moon", "rain", "snow", "corn", "fire") for last in ("beam", "field", "day")]
EFFORT = replace(QUICK, pool_sizes=(6, 10), events=6, check_every=3)


def made_up(name: str = "made up") -> Material:
    tasks = [Task(task, tuple(text.format(word) for word in WORDS[:5]), task[0]) for task, text in TEMPLATES.items()]
    asked = [Question(text.format(word), task) for task, text in TEMPLATES.items() for word in WORDS[4:8]]
    return material(name, tasks, asked)


def neighbours() -> Distractors:
    rows = {task: [TEMPLATES[task].format(word) for word in WORDS] for task in ("translate", "sentiment")}
    return distractors(rows, {"translate": "t", "sentiment": "s"}, wordings=3, per_wording=6)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    given = Data()
    given.paper, given.tasks, given.distractors = made_up(), made_up(), neighbours()
    return measure(list(PARTS), Lab(tmp_path_factory.mktemp("cache"), train=False, others=()), given, EFFORT)


def test_every_part_gives_tables_without_a_trained_encoder(report: Report) -> None:
    told = json.loads(json.dumps(asdict(report)))
    assert told["parts"].keys() == PARTS.keys()
    for name, tables in report.parts.items():
        assert (name == "fraction") != bool(tables[0].rows)
    sizes = {row["adapters"] for row in report.parts["pool"][0].rows}
    assert sizes == {6, 10}
    ways = [row["way"] for row in report.parts["means"][0].rows]
    assert {"plain mean", "nearest sample", "medoid"} < set(ways)


def test_leaked_questions_are_told_apart() -> None:
    found = made_up()
    assert len(found.leaked) == len(TEMPLATES)
    assert len(found.clean) == 3 * len(TEMPLATES)


def test_a_hub_answers_as_a_fresh_evaluation_all_through_arrivals(report: Report) -> None:
    rows = report.parts["arrivals"][0].rows
    assert [row["event"] for row in rows] == [0, 0, 3, 3, 6, 6]
    assert all(row["differing"] == 0 for row in rows)
    assert any(row["questions"] for row in rows)


def test_a_pool_of_the_paper_alone_scores_as_table_2(report: Report) -> None:
    small = [row for row in report.parts["pool"][0].rows if row["adapters"] == 6]
    table = [row for row in report.parts["table2"][0].rows if row["encoder"] == small[0]["encoder"]]
    assert [row["rerank"] for row in small] == [row["rerank"] for row in table] == ["no", "yes"]
    for one, other in zip(small, table, strict=True):
        assert one["top1"] == pytest.approx(other["top1"]["value"])
        assert one["mrr"] == pytest.approx(other["mrr"]["value"])


def test_tables_for_people(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    show(report)
    out = capsys.readouterr().out
    assert "Table 2 without leaked questions" in out
    assert "no trained encoder is in the cache" in out


def test_without_the_evaluation_data_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "DATA", tmp_path / "nothing")
    main(["--quick"])
    assert "skipped" in capsys.readouterr().out


def test_what_scores_as_the_right_adapter_comes_before_it() -> None:
    scores = np.array([[0.9, 0.9, 0.1], [0.3, 0.2, 0.1], [0.3, 0.2, 0.4]])
    places = ranks(scores, np.array([0, 0, 1]))
    assert places.tolist() == [1, 0, 2]
    assert accuracy(places)["top1"] == pytest.approx(100 / 3)
    assert accuracy(places)["top3"] == 100


def test_made_up_adapters_differ_and_wordings_share_no_row() -> None:
    made = neighbours()
    assert made.most == 2 * (3 + 1)
    adapters = made.adapters(made.most, 0)
    assert len({frozenset(adapter.inputs) for adapter in adapters}) == made.most
    assert {source_of(adapter.name) for adapter in adapters} == {"translate", "sentiment"}
    assert 0 < shared_texts(adapters, pairs=200) < 1
    contents = [{word for word in WORDS for text in texts if word in text.lower()} for texts in made.texts.values()]
    assert all(one.isdisjoint(other) for one, other in ((contents[0], contents[1]), (contents[1], contents[2])))
    assert neighbours().adapters(3, 5) == made.adapters(3, 5)


def test_a_wording_is_the_same_in_every_row() -> None:
    texts = neighbours().texts["translate", 0]
    words = [next(word for word in WORDS if word in text.lower()) for text in texts]
    assert len({text.lower().replace(word, "") for text, word in zip(texts, words, strict=True)}) == 1


def test_kept_vectors_are_not_made_again(tmp_path: Path, encoder: SentenceEncoder) -> None:
    first = KeptEncoder(encoder, tmp_path).encode(["one", "two", "one"])
    again = KeptEncoder(_Exhausted(encoder), tmp_path)
    assert np.array_equal(again.encode(["two", "one"]), first[[1, 0]])
    assert again.dimension == encoder.dimension
    with pytest.raises(RuntimeError):
        again.encode(["three"])


@pytest.mark.slow
def test_trained_encoders_are_kept_and_seen_tasks_told_apart(tmp_path: Path) -> None:
    given = Data()
    given.paper = made_up()
    recipe = RetrieverTrainer(steps=1)
    labs = [Lab(tmp_path, train=train, others=(), recipe=recipe) for train in (True, False)]
    (table, *_), (again, *_) = (PARTS["table2"](lab, given, EFFORT) for lab in labs)
    assert len(list((tmp_path / "trained").iterdir())) == 2
    assert again.rows == table.rows
    groups = {row["encoder"]: set[str]() for row in table.rows}
    for row in table.rows:
        groups[row["encoder"]].add(row["questions of"])
    assert groups["trained on 40 %"] == {"all", "seen", "unseen"}
    assert groups["trained on 100 %"] == {"all"}


class _Exhausted:
    """An encoder that has no vector left to give."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.name, self.fingerprint, self.dimension = encoder.name, encoder.fingerprint, encoder.dimension

    def encode(self, texts: Sequence[str]) -> Matrix:
        raise RuntimeError(f"{len(texts)} texts were to be encoded again")
