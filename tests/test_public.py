"""The public surface: what can be imported, how light that is, and one error tree."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lora_hub_sdk
from lora_hub_sdk import errors

HEAVY = ("torch", "transformers", "sentence_transformers", "chromadb", "peft", "langchain_core", "sqlalchemy")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = run("import sys, lora_hub_sdk; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_opening_a_hub_and_listing_loads_no_model_code(tmp_path: Path) -> None:
    loaded = run(
        f"""
        import sys, lora_hub_sdk
        with lora_hub_sdk.LoraHub({str(tmp_path / "hub.db")!r}) as hub:
            assert hub.list() == []
        print(*sys.modules)
        """
    ).split()
    assert not {"torch", "transformers", "sentence_transformers", "chromadb"} & set(loaded)


def test_every_exported_name_is_there() -> None:
    assert lora_hub_sdk.__all__ == sorted(lora_hub_sdk.__all__)
    for name in lora_hub_sdk.__all__:
        assert getattr(lora_hub_sdk, name) is not None
    assert set(lora_hub_sdk.__all__) <= set(dir(lora_hub_sdk))
    with pytest.raises(AttributeError, match="nothing_here"):
        lora_hub_sdk.nothing_here  # noqa: B018


def test_a_missing_extra_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "langchain_core.py").write_text("raise ModuleNotFoundError('no', name='langchain_core')")
    text = run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import lora_hub_sdk
        from lora_hub_sdk.errors import MissingExtraError
        try:
            lora_hub_sdk.LoraRetrieverLLM
        except MissingExtraError as error:
            print(error)
        """
    )
    assert "pip install 'lora-hub-sdk[langchain]'" in text


def test_every_error_is_in_the_tree_and_in_its_drawing() -> None:
    classes = {
        name: value for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__
    }
    assert all(issubclass(value, errors.LoraHubError) for value in classes.values())
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert {*drawn, "LoraHubError"} == set(classes)
    assert all(value.__doc__ for value in classes.values())


def test_every_error_raised_anywhere_is_of_the_tree() -> None:
    package = Path(lora_hub_sdk.__file__).parent
    own = set(vars(errors))
    allowed = {
        "AttributeError",
        "ValueError",
        "FileNotFoundError",
        "IndexError",
        "OSError",
        "StopIteration",
        "NotImplementedError",
        "RuntimeError",
        "UnprovenError",  # never leaves the engine
        "UnreadableError",  # never leaves the chat room
    }
    for file in sorted(package.rglob("*.py")):
        if {"training", "testing"} & set(file.parts):
            continue
        for name in re.findall(r"raise (\w+Error)\b", file.read_text()):
            private = name.startswith("_")
            assert name in own | allowed or private, f"{file.name} raises {name}"
