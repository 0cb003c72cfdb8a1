"""Programs in processes of their own that start with the heavy libraries imported: a second each instead of eight."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Final

import pytest

_HEAVY: Final = (
    "torch",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "sentence_transformers",
    "peft",
    "chromadb",
    "langchain_core.language_models",
    "lora_hub_sdk.cli.main",
)


@contextmanager
def programs(environment: Mapping[str, str]) -> Iterator[None]:
    """What ``run_program`` forks from: one process with this environment, as huggingface_hub reads it at its import."""
    _stop()  # other tests fork from it too, with another environment
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        get_context("forkserver").set_forkserver_preload(list(_HEAVY))
        forkserver.ensure_running()
    try:
        yield
    finally:
        _stop()


def run_program(command: Sequence[str], folder: Path, timeout_s: float) -> tuple[int | None, str]:
    """Exit status, None for none in time, and output of ``lora-hub ...`` or ``python FILE`` in the folder."""
    output = folder / "output.txt"
    process = get_context("forkserver").Process(target=_work, args=(list(command), folder, output))
    process.start()
    process.join(timeout_s)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status, output.read_text("utf-8", "replace") if output.exists() else ""


def _stop() -> None:
    """As Python's own tests do it; the next that wants one starts one."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _work(command: list[str], folder: Path, output: Path) -> None:
    os.chdir(folder)
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if command[0] == "python":
        sys.argv = command[1:]
        sys.path.insert(0, str(folder))
        runpy.run_path(command[1], run_name="__main__")
        return
    from lora_hub_sdk.cli import main

    sys.argv = command
    main()
