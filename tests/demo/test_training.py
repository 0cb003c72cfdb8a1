"""The demo adapters as shipped, and the builders that made their rows; nothing is trained or fetched here."""

from __future__ import annotations

import datetime
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

import lora_hub_sdk.demo.training
from lora_hub_sdk.demo.training import _gathered, _generated, _sql, train
from lora_hub_sdk.demo.training._cards import model_card, read_report, result_table
from lora_hub_sdk.demo.training._rows import HELD_OUT, SAMPLES, Item, Row, Task, alternate, build_split
from lora_hub_sdk.demo.training.metrics import exact_match, mean_score, word_f1
from lora_hub_sdk.demo.training.recipes import BASE_LAYERS, BASE_MODEL_ID, RECIPES
from lora_hub_sdk.demo.training.sources import LANGUAGE_CODES, SourceCache, _stanzas
from lora_hub_sdk.demo.training.tasks import TASKS

ADAPTERS = Path(lora_hub_sdk.demo.training.__file__).parents[1] / "adapters"
MOST_BYTES = 2_000_000
LEAST_GAIN = 20.0

every_task = pytest.mark.parametrize("task", TASKS)


def load(task: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ADAPTERS / task / name).read_text("utf-8"))
    return loaded


def rows(task: str, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ADAPTERS / task / name).read_text("utf-8").splitlines()]


# Metrics


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [("games", "games", 100.0), (" games\n", "games", 100.0), ("Games", "games", 0.0), ("", "games", 0.0)],
)
def test_exact_match(prediction: str, target: str, score: float) -> None:
    assert exact_match(prediction, target) == score


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("Il gatto nero", "il gatto nero", 100.0),
        ("il gatto", "il gatto nero dorme", 100 * 2 * 2 / 6),
        ("il il il il", "il gatto", 100 * 2 * 1 / 6),
        ("cane", "gatto", 0.0),
        ("", "gatto", 0.0),
        ("", "", 100.0),
    ],
)
def test_word_f1(prediction: str, target: str, score: float) -> None:
    assert word_f1(prediction, target) == pytest.approx(score)


def test_mean_score_needs_aligned_rows() -> None:
    assert mean_score("em", ["a", "b"], ["a", "c"]) == 50.0
    with pytest.raises(ValueError, match="at least one row"):
        mean_score("em", [], [])
    with pytest.raises(ValueError, match="argument 2"):
        mean_score("em", ["a"], ["a", "b"])


# The shipped adapters


def test_every_task_has_a_recipe_and_a_folder() -> None:
    assert set(RECIPES) == set(TASKS)
    assert {path.name for path in ADAPTERS.iterdir() if path.is_dir()} == set(TASKS)


@every_task
def test_the_folder_holds_the_expected_files_only(task: str) -> None:
    assert {path.name for path in (ADAPTERS / task).iterdir()} == set(train.ADAPTER_FILES)


@every_task
def test_weights_are_small_finite_bfloat16(task: str) -> None:
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    path = ADAPTERS / task / "adapter_model.safetensors"
    assert path.stat().st_size <= MOST_BYTES
    tensors = safetensors.load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    # An untrained lora_B is all zero: such an adapter would change nothing.
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@every_task
def test_the_config_is_the_recipe(task: str) -> None:
    config = load(task, "adapter_config.json")
    recipe = RECIPES[task]
    assert config["base_model_name_or_path"] == BASE_MODEL_ID
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (recipe.rank, recipe.alpha)
    assert config["use_rslora"] == recipe.use_rslora
    assert set(config["target_modules"]) == set(recipe.modules)
    assert config["rank_pattern"] == recipe.rank_pattern
    assert config["alpha_pattern"] == recipe.alpha_pattern
    count = recipe.last_layers
    expected = None if count is None else list(range(BASE_LAYERS - count, BASE_LAYERS))
    assert config["layers_to_transform"] == expected


def test_the_shapes_are_mixed() -> None:
    recipes = list(RECIPES.values())
    assert len({recipe.rank for recipe in recipes}) >= 6
    assert len({recipe.alpha / recipe.rank for recipe in recipes}) >= 3
    assert len({recipe.modules for recipe in recipes}) >= 6
    assert sum(recipe.use_rslora for recipe in recipes) in (1, 2)
    assert any(recipe.rank_pattern and recipe.alpha_pattern for recipe in recipes)
    assert any(recipe.last_layers for recipe in recipes)


@every_task
def test_samples_and_held_out_rows_are_disjoint(task: str) -> None:
    samples, heldout = rows(task, "samples.jsonl"), rows(task, "heldout.jsonl")
    assert (len(samples), len(heldout)) == (SAMPLES, HELD_OUT)
    assert all(set(row) == {"inputs", "targets"} for row in samples)
    assert all(set(row) == {"inputs", "targets", "task", "metric"} for row in heldout)
    assert {(row["task"], row["metric"]) for row in heldout} == {(task, TASKS[task].metric)}
    inputs = [row["inputs"] for row in samples + heldout]
    assert len(set(inputs)) == SAMPLES + HELD_OUT


@every_task
def test_the_adapter_beats_the_base_model(task: str) -> None:
    report = load(task, "training.json")
    assert report["after"] - report["before"] >= LEAST_GAIN
    assert report["task"] == task
    assert len(report["losses"]) == report["recipe"]["steps"] == RECIPES[task].steps


@every_task
def test_the_card_names_base_tags_licence_and_scores(task: str) -> None:
    card = (ADAPTERS / task / "README.md").read_text("utf-8")
    report = load(task, "training.json")
    _, header, text = card.split("---\n", 2)
    assert f"base_model: {BASE_MODEL_ID}\n" in header
    assert "library_name: peft\n" in header
    assert f"license: {TASKS[task].licence_id}\n" in header
    for tag in ("lora", f"base_model:adapter:{BASE_MODEL_ID}", "lora-hub-sdk-demo"):
        assert f"- {tag}\n" in header
    assert TASKS[task].licence in text
    assert TASKS[task].source in text
    assert f"| {report['before']} | {report['after']} |" in text


@every_task
def test_the_card_is_the_one_that_the_code_writes(task: str) -> None:
    samples = [Row(**row) for row in rows(task, "samples.jsonl")]
    card = (ADAPTERS / task / "README.md").read_text("utf-8")
    assert card == model_card(TASKS[task], read_report(ADAPTERS / task), samples)
    assert read_report(ADAPTERS / task).recipe == RECIPES[task]


def test_the_documented_table_is_the_one_of_the_reports() -> None:
    page = Path(__file__).parents[2] / "docs" / "demo-adapters.md"
    assert result_table(ADAPTERS, tuple(TASKS)) in page.read_text("utf-8")


# Splitting rows


def test_a_split_words_every_item_once_and_repeats_itself(tmp_path: Path) -> None:
    task = TASKS["identifier-case"]
    cache = SourceCache(tmp_path)
    split = build_split(task, cache, train_rows=200, seed=1)
    assert split == build_split(task, cache, train_rows=200, seed=1)
    assert split != build_split(task, cache, train_rows=200, seed=2)
    assert split.samples == split.train[:SAMPLES]
    assert not {row.inputs for row in split.train} & {row.inputs for row in split.heldout}
    heads = [template.split("{")[0] for template in task.templates if not template.startswith("{")]
    assert all(any(row.inputs.startswith(head) for row in split.samples) for head in heads)
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_too_few_items_is_refused(tmp_path: Path) -> None:
    def few(rng: random.Random, cache: SourceCache) -> Any:
        return iter([Item("a", "b"), Item("A", "b")])

    task = Task("tiny", "", "em", ("en",), "", "", "", ("{text}",), few)
    with pytest.raises(ValueError, match="task tiny: the source gave 1 items"):
        build_split(task, SourceCache(tmp_path), train_rows=10, seed=1)


def test_alternate_is_balanced_at_every_cut() -> None:
    groups = [[Item(f"{label}{i}", label) for i in range(size)] for label, size in (("a", 5), ("b", 3))]
    labels = [item.targets for item in alternate(groups, random.Random(0))]
    assert len(labels) == 6
    assert all(set(labels[i : i + 2]) == {"a", "b"} for i in range(0, 6, 2))


@every_task
def test_templates_use_what_the_items_have(task: str) -> None:
    templates = TASKS[task].templates
    assert 3 <= len(templates) <= 5
    assert all("{text}" in template for template in templates)
    assert len({"{context}" in template for template in templates}) == 1


# Builders


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zéro"),
        (71, "soixante et onze"),
        (80, "quatre-vingts"),
        (1995, "mille neuf cent quatre-vingt-quinze"),
    ],
)
def test_french_words(number: int, words: str) -> None:
    pytest.importorskip("num2words", reason="the demo-train extra is not installed")
    assert _generated.french_words(number) == words


@pytest.mark.parametrize(
    ("style", "locale", "text"),
    [
        ("long", "en_US", "July 3, 2021"),
        ("full", "fr", "samedi 3 juillet 2021"),
        ("medium", "de", "03.07.2021"),
        ("long", "es", "3 de julio de 2021"),
        ("full", "it", "sabato 3 luglio 2021"),
    ],
)
def test_a_date_is_written_as_its_locale_does(style: str, locale: str, text: str) -> None:
    pytest.importorskip("babel", reason="the demo-train extra is not installed")
    item = _generated.date_item(datetime.date(2021, 7, 3), style=style, locale=locale)
    assert item == Item(text, "2021-07-03")


def test_no_written_date_can_be_read_two_ways() -> None:
    pytest.importorskip("babel", reason="the demo-train extra is not installed")
    days = [datetime.date(1999, 1, 1) + datetime.timedelta(days=i) for i in range(365)]
    meaning: dict[str, str] = {}
    for day, style, locale in itertools.product(days, _generated._DATE_STYLES, _generated.DATE_LOCALES):
        item = _generated.date_item(day, style=style, locale=locale)
        assert meaning.setdefault(item.text, item.targets) == item.targets


def test_a_contact_keeps_its_facts_and_key_order() -> None:
    item = _generated.contact_item(
        "{name} works for {company} in {city} and can be reached at {email}.",
        name="Ada Byron",
        email="ada@example.org",
        company="Engines, Inc",
        city="London",
    )
    assert item.text == "Ada Byron works for Engines, Inc in London and can be reached at ada@example.org."
    assert item.targets == (
        '{"name": "Ada Byron", "email": "ada@example.org", "company": "Engines, Inc", "city": "London"}'
    )


def test_every_contact_fact_stands_in_its_sentence(tmp_path: Path) -> None:
    pytest.importorskip("faker", reason="the demo-train extra is not installed")
    items = itertools.islice(_generated.contacts(random.Random(3), SourceCache(tmp_path)), 200)
    for item in items:
        assert all(value in item.text for value in json.loads(item.targets).values())


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        ("camel", "parseHTTPResponse"),
        ("pascal", "ParseHTTPResponse"),
        ("kebab", "parse-http-response"),
        ("phrase", "Parse HTTP response"),
        ("dotted", "parse.HTTP.response"),
    ],
)
def test_spell(spelling: str, text: str) -> None:
    assert _generated.spell(["parse", "HTTP", "response"], spelling) == text


def test_spell_refuses_an_unknown_spelling() -> None:
    with pytest.raises(ValueError, match="unknown spelling 'train'"):
        _generated.spell(["a"], "train")


def test_identifiers_lose_nothing_but_case_and_separators(tmp_path: Path) -> None:
    for item in itertools.islice(_generated.identifiers(random.Random(5), SourceCache(tmp_path)), 300):
        letters = "".join(character for character in item.text if character.isalpha()).lower()
        assert letters == item.targets.replace("_", "")


def test_sql_runs_and_means_what_it_says(tmp_path: Path) -> None:
    import sqlite3

    database = sqlite3.connect(":memory:")
    for table in _sql.TABLES:
        database.execute(f"CREATE TABLE {table.schema}")
    for item in itertools.islice(_sql.sql_questions(random.Random(9), SourceCache(tmp_path)), 400):
        database.execute(item.targets)
        assert item.context in {table.schema for table in _sql.TABLES}
    database.close()


def test_queries_in_words_and_in_sql() -> None:
    cars = next(table for table in _sql.TABLES if table.name == "cars")
    condition = _sql.Condition(" with price above 20", " WHERE price > 20")
    query = _sql.count_query(cars, condition, random.Random(0))
    assert cars.schema == "cars(brand, color, price, year)"
    assert query.sql == "SELECT COUNT(*) FROM cars WHERE price > 20;"
    assert query.question in (
        "How many cars are there with price above 20?",
        "Count the cars with price above 20.",
    )


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        (_generated.french_numbers, "num2words"),
        (_generated.written_dates, "babel"),
        (_generated.contacts, "faker"),
        (_generated.identifiers, "json"),
        (_sql.sql_questions, "json"),
    ],
)
def test_generated_items_depend_on_the_seed_alone(source: Any, needs: str, tmp_path: Path) -> None:
    pytest.importorskip(needs, reason="the demo-train extra is not installed")
    cache = SourceCache(tmp_path)

    def make(seed: int) -> list[Item]:
        return list(itertools.islice(source(random.Random(seed), cache), 40))

    assert make(1) == make(1) != make(2)


# Reading sources


def test_stanzas_of_a_control_file(tmp_path: Path) -> None:
    path = tmp_path / "Translation-it"
    path.write_text("Package: a\nDescription-it: uno\n due\n .\n tre\n\nPackage: b\nSection: games\n", "utf-8")
    assert list(_stanzas(path)) == [
        {"Package": "a", "Description-it": "uno\ndue\n.\ntre"},
        {"Package": "b", "Section": "games"},
    ]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("One game. It is fun.\n.\nMore.", "One game."),
        ("A line\nthat goes on! Yes.", "A line that goes on!"),
        ("Features:\n * one\n * two", ""),
        ("word " * 25, ""),
    ],
)
def test_first_sentence(body: str, sentence: str) -> None:
    assert _gathered.first_sentence(body) == sentence


def test_every_language_is_fetched() -> None:
    assert set(_gathered.LANGUAGES) == set(LANGUAGE_CODES)


# The command


def test_a_complete_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "date-iso"
    folder.mkdir()
    for name in train.ADAPTER_FILES:
        (folder / name).touch()
    unused: Any = None
    run = train.Run(learner=unused, cache=SourceCache(tmp_path), output=tmp_path, force=False)
    train.make_adapter(TASKS["date-iso"], run)
    assert "complete, skipped" in capsys.readouterr().out


def test_a_failed_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(train, "_train_into", fail)
    unused: Any = None
    run = train.Run(learner=unused, cache=SourceCache(tmp_path), output=tmp_path / "out", force=False)
    with pytest.raises(RuntimeError, match="no memory"):
        train.make_adapter(TASKS["date-iso"], run)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_new_folder_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    old, new = tmp_path / "task", tmp_path / ".work"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    train._replace_folder(new, old)
    assert (old / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["task"]
