"""Which form a chat template writes, and what a model is told where its template cannot show tools."""

from __future__ import annotations

import pytest

from lora_hub_sdk.chat.formats import ToolFormat, format_of, shows_tools
from lora_hub_sdk.chat.hermes import Hermes
from lora_hub_sdk.chat.llama3 import Llama3
from lora_hub_sdk.chat.mistral import Mistral
from lora_hub_sdk.messages import Message, ToolCall
from tests.chat.tools import asked

_PLAIN = "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, Hermes()),
        (_PLAIN, Hermes()),
        ("{{ '<tool_call>\\n' + call | tojson }}", Hermes()),
        ("{{ '<|start_header_id|>' }}{{ '<|python_tag|>' + call }}", Llama3()),
        ("{{ '<|start_header_id|>' }}{{ '\"parameters\": ' }}", Llama3()),
        ("{{ '[TOOL_CALLS] [' + calls + ']' }}", Mistral()),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' + call }}", Mistral(named=True)),
    ],
)
def test_the_form_is_what_the_template_writes(template: str | None, form: ToolFormat) -> None:
    found = format_of(template)

    assert type(found) is type(form)
    assert found.written([ToolCall("a", "{}", "1")]) == form.written([ToolCall("a", "{}", "1")])


@pytest.mark.parametrize(
    ("template", "shows"),
    [
        (None, False),
        (_PLAIN, False),
        ("{{ 'Use your tools.' }} tools", False),
        ("{% if message.tools %}{{ my_tools }}{% endif %}", False),
        ("{%- if tools %}{{ 'x' }}{% endif %}", True),
        ("{{ tools | tojson }}", True),
        ("{%- for tool in\n tools -%}{% endfor %}", True),
    ],
)
def test_a_template_that_uses_the_tools_shows_them(template: str | None, shows: bool) -> None:
    assert shows_tools(template) is shows


@pytest.mark.parametrize("form", [Hermes(), Llama3(), Mistral(), Mistral(named=True)], ids=str)
def test_a_model_is_told_of_the_tools_that_it_may_call_and_how(form: ToolFormat) -> None:
    auto = form.instructions(asked())
    one = form.instructions(asked("search_all", parallel=False))

    assert '"name": "search"' in auto
    assert "maxLength" in auto
    assert form.markers[0] in auto or form.name == "llama3"
    assert "plain text" in auto
    assert "several calls" in auto
    assert '"name": "search"' not in one
    assert "must be a call of search_all" in one
    assert "no more than one" in one
    assert "must be a call." in form.instructions(asked("any"))
    assert form.instructions(asked("none")) == ""


@pytest.mark.parametrize("form", [Hermes(), Llama3(), Mistral(), Mistral(named=True)], ids=str)
def test_results_and_calls_of_any_kind_can_be_written(form: ToolFormat) -> None:
    assert "42" in form.result(Message("tool", "42", tool_call_id="1"))
    assert "not json" in form.written([ToolCall("search", "not json", "1")])
