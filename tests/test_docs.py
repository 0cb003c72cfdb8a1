"""Every snippet in README and docs runs: Python blocks of a page one after another, shell blocks line by line.

They run as a reader would run them, in an empty folder of their own. The only help is a loopback Hub in place of
huggingface.co, which has the repositories that the pages name. As most of the time is that of starting programs, two
pages run at a time, and those beside the README have the heavy libraries imported already.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.testing import LocalHub
from tests.programs import programs, run_program

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").rglob("*.md")])
#: Set-up and long jobs, which CI runs as a whole, or which take minutes by design; and what needs a token.
NOT_HERE = re.compile(r"make |pip |python -m benchmarks|.*demo\.training|lora-hub demo|lora-hub push-retriever")
#: What a line of our program holds if the shell has more to do than to split it into words.
FOR_THE_SHELL = re.compile(r"[|<>;&$`*]")
TIMEOUT_S = 400.0


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with LocalHub() as server:
        adapters = {adapter.name: adapter for adapter in demo_adapters()}
        server.publish("user/lora-x", adapters["translate-it"].folder)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        cache = str(tmp_path_factory.mktemp("hf"))
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": cache, "PATH": path}
        with programs(environment):
            yield environment


def run(command: list[str], environment: dict[str, str], folder: Path, page: Path) -> None:
    if page != README and command[0] in ("python", "lora-hub"):
        status, output = run_program(command, folder, TIMEOUT_S)
    else:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        status, output = done.returncode, done.stdout + done.stderr
    assert status == 0, f"{page.name}: {command}: {status}\n{output}"


def run_python(page: Path, environment: dict[str, str], folder: Path) -> None:
    script = folder / "page.py"
    script.write_text("\n\n".join(blocks(page, "python")), "utf-8")
    run(["python", str(script)], environment, folder, page)


def run_shell(page: Path, environment: dict[str, str], folder: Path) -> None:
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
        if line.strip() and not line.startswith("#") and not NOT_HERE.match(line):
            plain = line.startswith("lora-hub ") and not FOR_THE_SHELL.search(line)
            run(shlex.split(line) if plain else ["bash", "-c", line], environment, folder, page)


RUNS: dict[str, Callable[[Path, dict[str, str], Path], None]] = {"python": run_python, "sh": run_shell}
CASES = [(page, language) for page in PAGES for language in RUNS if blocks(page, language)]


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[Path, str], Future[None]]]:
    """The pages that were chosen, each on its way or done."""
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if hasattr(item, "callspec") and "case" in item.callspec.params and item.path == Path(__file__)
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {
            (page, language): pool.submit(RUNS[language], page, environment, tmp_path_factory.mktemp(page.stem))
            for page, language in chosen
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].stem}-{case[1]}")
def test_page(case: tuple[Path, str], running: dict[tuple[Path, str], Future[None]]) -> None:
    running[case].result()


def test_there_is_something_to_run() -> None:
    assert blocks(README, "python")
    assert blocks(README, "sh")
