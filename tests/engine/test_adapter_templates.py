from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lora_hub_sdk.engine.base_model import load_base_model
from lora_hub_sdk.engine.engine import Engine
from lora_hub_sdk.engine.prompt import Template
from lora_hub_sdk.engine.request import Request
from lora_hub_sdk.errors import ConfigurationError, InvalidConfigError, UnsupportedRouteError
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.testing import tiny_adapter, tiny_base
from lora_hub_sdk.types import Adapter, Route, Sampling
from tests.support import adapter_at, route_of

OWN = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
OTHER = "{% for message in messages %}({{ message['content'] }}){% endfor %}"
HARM = "{{ messages.__class__.__mro__[-1].__subclasses__() }}"


class Bench:
    """A base with a chat template, and adapters that bring some."""

    def __init__(self, folder: Path) -> None:
        self.folder = tiny_base(folder / "base", chat=True)
        self.base = load_base_model(resolve_model(self.folder))
        self.engine = Engine(self.base)
        usual = str(self.base.tokenizer.chat_template)
        brought = {"none": None, "own": OWN, "twin": OWN, "other": OTHER, "usual": usual + "\n", "harm": HARM}
        self.adapters: dict[str, Adapter] = {}
        for seed, (name, template) in enumerate(brought.items()):
            path = tiny_adapter(folder / name, self.folder, seed=seed)
            if template is not None and name != "twin":
                (path / "chat_template.jinja").write_text(template)
            if name == "twin":
                (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
            self.adapters[name] = adapter_at(path, self.folder, id=seed)

    def route(self, *names: str) -> Route:
        return route_of("mixture", *((self.adapters[name], 1 / len(names)) for name in names))

    def prompt(self, template: Any, *names: str) -> str:
        """What the model is given."""
        request = Request("hi", self.route(*names), Sampling(1), template=template)
        tokenizer: Any = self.base.tokenizer
        return str(tokenizer.decode(self.engine._encode(0, request)[0].ids))


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    made = Bench(tmp_path)
    yield made
    made.engine.close()


USUAL = "<user>hi\n<assistant>"


@pytest.mark.parametrize(
    ("names", "prompt"),
    [
        (("own",), "[hi]"),
        (("own", "none"), "[hi]"),
        (("own", "twin"), "[hi]"),
        (("own", "usual"), "[hi]"),
        (("none",), USUAL),
        (("usual",), USUAL),
        (("none", "own"), USUAL),
        ((), USUAL),
    ],
)
def test_adapter_takes_what_the_first_one_brings_and_else_the_bases(
    bench: Bench, names: tuple[str, ...], prompt: str
) -> None:
    assert bench.prompt("adapter", *names) == prompt


def test_different_ones_in_a_route_are_refused_by_name(bench: Bench) -> None:
    with pytest.raises(UnsupportedRouteError, match="'own', 'other' bring different"):
        bench.prompt("adapter", "own", "other")


def test_auto_uses_the_bases_and_tells_once_of_each_adapter_that_brings_another(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert bench.prompt("auto", "own", "usual", "none") == USUAL
    (record,) = [record for record in caplog.records if record.name.endswith("adapter_templates")]
    assert "'own'" in record.getMessage()
    assert "template='adapter'" in record.getMessage()


@pytest.mark.parametrize("template", ["chat", "alpaca", None])
def test_whoever_names_a_template_gets_that_one(bench: Bench, template: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert "[hi]" not in bench.prompt(template, "own")
    assert not caplog.records


def test_a_program_that_leaves_the_sandbox_is_refused(bench: Bench) -> None:
    assert bench.prompt("auto", "harm") == USUAL
    with pytest.raises(ConfigurationError, match="own chat template fails \\(SecurityError"):
        bench.prompt("adapter", "harm")


def test_a_damaged_file_stops_only_whoever_asks_for_it(bench: Bench) -> None:
    (bench.adapters["none"].folder / "tokenizer_config.json").write_bytes(b"{")
    assert bench.prompt("auto", "none") == USUAL
    bench.adapters["usual"].folder.joinpath("chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InvalidConfigError, match="chat_template"):
        bench.prompt("adapter", "usual")


def test_an_answer_with_it_is_that_of_the_text_it_writes(bench: Bench) -> None:
    route = bench.route("own")
    pairs: tuple[tuple[str, Template], ...] = (("hi", "adapter"), ("[hi]", None))
    found, expected = (
        bench.engine.generate([Request(text, route, Sampling(8), template=template)])[0].text
        for text, template in pairs
    )
    assert found == expected
