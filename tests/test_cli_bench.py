"""The benchmark from the command line, on a tiny base with three adapters."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lora_hub_sdk.cli import app
from lora_hub_sdk.evaluation.answers import ANSWERS_FILE
from lora_hub_sdk.hub import LoraHub
from lora_hub_sdk.retriever.encoder import SentenceEncoder
from lora_hub_sdk.testing import tiny_adapter

ASKED = {"french": "Translate {} to French", "plural": "The plural of {}", "mood": "Is {} good or bad?"}
WORDS = ("oak", "lamp", "stone", "paper")
METRIC = {"french": "rouge", "plural": "em", "mood": "em"}


@dataclass(frozen=True)
class Setup:
    database: Path
    base: Path
    questions: Path
    training: Path

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(app, ["bench", *args])

    def mixed(self, output: Path, *args: str) -> Result:
        common = ["--base-model", str(self.base), "--database", str(self.database), "--output", str(output)]
        return self.run("mixed", str(self.questions), *common, "--index", "exact", *args)

    def json(self, output: Path, *args: str) -> Any:
        result = self.mixed(output, *args, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


def write_rows(path: Path, words: tuple[str, ...]) -> Path:
    rows = [
        {"inputs": asked.format(word), "targets": word[::-1], "task": task, "domain": "d", "metric": METRIC[task]}
        for task, asked in ASKED.items()
        for word in words
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def setup(base: Path, encoder: SentenceEncoder, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("bench")
    with LoraHub(folder / "hub.db", encoder=encoder, index="exact") as hub:
        for seed, (task, asked) in enumerate(ASKED.items()):
            made = tiny_adapter(folder / task, base, seed=seed, rank=2 + seed, alpha=30)
            # One is known by its tag, the others by their names.
            name, tags = ("moods", ["task:mood"]) if task == "mood" else (task, [])
            hub.register(made, base_model=base, name=name, tags=tags, samples=[asked.format(word) for word in WORDS])
    questions = write_rows(folder / "questions.jsonl", ("house", "wind", "river"))
    return Setup(folder / "hub.db", base, questions, write_rows(folder / "training.jsonl", ("house", "glass", "sand")))


def test_chosen_systems_are_measured_and_the_report_is_made_again_from_the_answers(
    setup: Setup, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    chosen = ("--systems", "base, perfect,selection,mixture@2,mixture-ood", "--per-task", "2")
    told = setup.json(output, *chosen)
    names = [one["name"] for one in told["systems"]]
    assert names == ["base", "perfect", "selection", "mixture@2", "mixture-ood"]
    assert (told["questions"], told["adapters"], told["orphans"]) == (6, 3, [])
    assert all(one["answered"] == 6 for one in told["systems"])
    perfect = told["systems"][1]
    assert (perfect["own"], perfect["adapters"]) == (1.0, 1.0)
    assert told["told"]["command"].startswith(f"lora-hub bench mixed {setup.questions} --base-model {setup.base}")
    assert "--per-task 2" in told["told"]["command"]
    lines = (output / ANSWERS_FILE).read_bytes()
    again = setup.json(output, *chosen)
    assert (output / ANSWERS_FILE).read_bytes() == lines
    assert again["generated"] == told["generated"]
    page = (output / "report.md").read_bytes()
    (output / "report.md").unlink()
    result = setup.run("report", str(output))
    assert result.exit_code == 0, result.output
    assert (output / "report.md").read_bytes() == page
    for expected in ("mixture@2", "not shown", f"wrote {output / 'report.md'}"):
        assert expected in result.stdout
    (output / ANSWERS_FILE).write_bytes(b"".join(lines.splitlines(keepends=True)[:-3]))
    assert "3 answers are still to come" in setup.run("report", str(output)).stdout
    fewer = json.loads(setup.run("report", str(output), "--systems", "perfect,base", "--json").stdout)
    assert [one["name"] for one in fewer["systems"]] == ["base", "perfect"]


@pytest.mark.slow
def test_without_names_every_system_is_asked_and_those_that_cannot_run_are_told(setup: Setup, tmp_path: Path) -> None:
    told = setup.json(tmp_path / "run", "--per-task", "1")
    assert {"perfect", "mixture-ood", "gate", "arrow"} <= {one["name"] for one in told["systems"]}
    assert {"moe-soft", "lorahub", "ramole", "lorauter"} <= set(told["left_out"])
    assert "no training rows" in told["left_out"]["lorahub"]


@pytest.mark.slow
def test_training_rows_that_are_questions_are_not_used_and_figures_are_drawn(setup: Setup, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ("--training", str(setup.training), "--systems", "adaptersoup,mixture", "--figures")
    told = setup.json(output, *options)
    assert [one["name"] for one in told["systems"]] == ["mixture", "adaptersoup"]
    assert {Path(file).suffix for file in told["figures"]} == {".png", ".json"}
    assert all(Path(file).stat().st_size > 100 for file in told["figures"])
    assert {"quality_by_k", "throughput", "similarity"} <= {Path(file).stem for file in told["figures"]}
    # The folder stands on the two words that are left; fewer of them are another run.
    fewer = setup.mixed(output, *options[:4], "--training-per-task", "1")
    assert fewer.exit_code == 1
    assert "another run: its training rows" in fewer.output
    more = setup.json(output, *options[:4], "--training-per-task", "2")
    assert more["generated"] == json.loads((output / "run.json").read_bytes())["answered"]


def test_what_cannot_be_asked_for_is_an_error_without_a_traceback(setup: Setup, tmp_path: Path) -> None:
    def error(*args: str, output: Path = tmp_path / "run") -> str:
        result = setup.mixed(output, *args, "--json")
        assert result.exit_code == 1, result.output
        return str(json.loads(result.stdout)["error"]["message"])

    assert "system 'magic' is unknown" in error("--systems", "magic")
    assert "adaptersoup" in error("--systems", "adaptersoup")
    own = tmp_path / "own.json"
    own.write_text('{"french": "nobody"}')
    assert "names adapter 'nobody'" in error("--systems", "perfect", "--own", str(own), output=tmp_path / "other")
    own.write_text("[]")
    assert "expected an object" in error("--own", str(own))
    (tmp_path / "file").write_text("")
    assert "cannot be made" in error("--systems", "base", output=tmp_path / "file")
    gone = setup.run("report", str(tmp_path / "nowhere"), "--json")
    assert "no record of a run" in json.loads(gone.stdout)["error"]["message"]


def test_the_systems_are_listed_with_what_they_are() -> None:
    found = {one["name"]: one for one in json.loads(CliRunner().invoke(app, ["bench", "systems", "--json"]).stdout)}
    assert found["smear"]["learns"]
    assert not found["mixture"]["learns"]
    assert "averaged" in found["fusion"]["description"]
    assert "mixture-ood" in CliRunner().invoke(app, ["bench", "systems"]).stdout


def test_looking_needs_no_torch() -> None:
    program = (
        "import sys\nfrom lora_hub_sdk.cli import app\n"
        "for args in (['bench', 'mixed', '--help'], ['bench', 'systems']):\n"
        "    try:\n        app(args)\n    except SystemExit as end:\n        assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'chromadb', 'matplotlib', 'nevergrad'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    done = run_process([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
