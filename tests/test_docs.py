"""Every snippet in README and docs runs: Python blocks of a page one after another, shell blocks line by line.

They run as a reader would run them, in an empty folder of their own. The only help is a loopback Hub in place of
huggingface.co, which has the repositories that the pages name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_hub_sdk.demo import demo_adapters
from lora_hub_sdk.testing import LocalHub

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
#: Set-up and long jobs, which CI runs as a whole, or which take minutes by design; and what needs a token.
NOT_HERE = re.compile(r"make |pip |python -m benchmarks|.*demo\.training|lora-hub demo|lora-hub push-retriever")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with LocalHub() as server:
        adapters = {adapter.name: adapter for adapter in demo_adapters()}
        server.publish("user/lora-x", adapters["translate-it"].folder)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        yield {**os.environ, "HF_ENDPOINT": server.url, "PATH": path}


def run(command: list[str], environment: dict[str, str], folder: Path, page: Path) -> None:
    settings = {**environment, "HF_HUB_CACHE": str(folder / "hf")}
    done = subprocess.run(command, env=settings, cwd=folder, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, f"{page.name}: {command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page, "python")), "utf-8")
    run([sys.executable, str(script)], environment, tmp_path, page)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.name)
def test_shell_lines(page: Path, environment: dict[str, str], tmp_path: Path) -> None:
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", "").splitlines():
        if line.strip() and not line.startswith("#") and not NOT_HERE.match(line):
            run(["bash", "-c", line], environment, tmp_path, page)


def test_there_is_something_to_run() -> None:
    assert blocks(ROOT / "README.md", "python")
    assert blocks(ROOT / "README.md", "sh")
