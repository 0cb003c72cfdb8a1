"""Grammars of answers with calls, held against llguidance with SmolLM2's tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from lora_hub_sdk.chat.formats import ToolFormat
from lora_hub_sdk.chat.hermes import Hermes
from lora_hub_sdk.chat.llama3 import Llama3
from lora_hub_sdk.chat.mistral import Mistral
from lora_hub_sdk.chat.openai_form import constraint_of
from lora_hub_sdk.messages import Conversation, Tool
from lora_hub_sdk.models import resolve_model
from lora_hub_sdk.types import Constraint
from tests.chat.tools import ARGUMENTS, SEARCH, SEARCH_ALL, asked

_FORMS: dict[str, ToolFormat] = {
    "hermes": Hermes(),
    "llama3": Llama3(),
    "mistral": Mistral(),
    "mistral-named": Mistral(named=True),
}
#: One call with arguments, then both calls, in each form.
_ONE = {
    "hermes": f'<tool_call>\n{{"name": "search", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3": f'{{"name": "search", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "search", "arguments": {ARGUMENTS}}}]',
    "mistral-named": f"[TOOL_CALLS]search[ARGS]{ARGUMENTS}",
}
_TWO = {
    "hermes": _ONE["hermes"] + '\n<tool_call>\n{"name": "search_all", "arguments": {}}\n</tool_call>',
    "llama3": _ONE["llama3"] + '; {"name": "search_all", "parameters": {}}',
    "mistral": _ONE["mistral"][:-1] + ', {"name": "search_all", "arguments": {}}]',
    "mistral-named": _ONE["mistral-named"] + "[TOOL_CALLS]search_all[ARGS]{}",
}
_LEAD = {"hermes": "Wait.\n", "llama3": "Wait.\n<|python_tag|>", "mistral": "Wait. ", "mistral-named": "Wait."}
_PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@dataclass(frozen=True)
class Held:
    """A tokenizer that has all markers as special tokens, or none."""

    tokenizer: Any
    own: Any

    def special(self, form: ToolFormat) -> Mapping[str, int]:
        known = self.tokenizer.get_added_vocab()
        return {text: known[text] for text in form.markers if text in known}

    def grammar(self, form: ToolFormat, conversation: Conversation, answer: Constraint | None = None) -> Any:
        made = form.grammar(conversation, answer, self.special(form))
        assert made is not None
        assert made.kind == "lark"
        matcher = LLMatcher(self.own, LLMatcher.grammar_from_lark(made.text), log_level=0)
        assert not matcher.get_error(), f"{matcher.get_error()}\n{made.text}"
        return matcher

    def reads(self, matcher: Any, text: str) -> str:
        """ "whole": an answer that may end here, "begun": one that may go on, "no"."""
        matcher = matcher.deep_copy()
        for token in self.tokenizer.encode(text, add_special_tokens=False):
            if not matcher.try_consume_tokens([token]):
                return "no"
        return "whole" if matcher.is_accepting() else "begun"


@cache
def _held(special: bool) -> Held:
    folder = resolve_model("smollm2-135m-instruct", offline=True).folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if special:
        markers = sorted({marker for form in _FORMS.values() for marker in form.markers})
        tokenizer.add_special_tokens({"additional_special_tokens": markers})
    return Held(tokenizer, from_tokenizer(tokenizer))


@pytest.fixture(params=[False, True], ids=["markers-as-text", "markers-special"])
def held(request: pytest.FixtureRequest) -> Held:
    return _held(request.param)


@pytest.fixture(params=_FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_auto_takes_text_and_calls_and_both(held: Held, form: str) -> None:
    matcher = held.grammar(_FORMS[form], asked())

    for text in ["", "Nothing is new.\n", "1 < 2 [TOOL {", _ONE[form], _TWO[form], _LEAD[form] + _TWO[form]]:
        assert held.reads(matcher, text) == "whole", text
    # Nothing follows a call but another one.
    assert held.reads(matcher, _ONE[form] + " More.") == "no"


def test_auto_holds_what_begins_like_a_call_to_the_tools(held: Held, form: str) -> None:
    matcher = held.grammar(_FORMS[form], asked())

    for lead in ["", _LEAD[form]]:
        call = lead + _ONE[form]
        assert held.reads(matcher, call.replace("search", "forget")) == "no"
        assert held.reads(matcher, call.replace("query", "quarry")) == "no"
        assert held.reads(matcher, call.replace("b/c", "d")) == "no"
        assert held.reads(matcher, call.replace("[1, 9]", "[1, 10]")) == "no"
        assert held.reads(matcher, call.replace('"deep": true', '"deep": true, "more": 1')) == "no"
        assert held.reads(matcher, call[: call.index(" 9]")]) == "begun"


@pytest.mark.parametrize("choice", ["any", "search"])
def test_a_call_that_has_to_be_made_leaves_no_way_to_text(held: Held, form: str, choice: str) -> None:
    matcher = held.grammar(_FORMS[form], asked(choice))

    assert held.reads(matcher, _ONE[form]) == "whole"
    assert held.reads(matcher, _TWO[form]) == ("whole" if choice == "any" else "no")
    assert held.reads(matcher, "") == "begun"
    assert held.reads(matcher, "Nothing") == "no"
    assert held.reads(matcher, _LEAD[form] + _ONE[form]) == "no"


@pytest.mark.parametrize("choice", ["auto", "any"])
def test_without_parallel_calls_the_first_one_ends_the_answer(held: Held, form: str, choice: str) -> None:
    matcher = held.grammar(_FORMS[form], asked(choice, parallel=False))

    assert held.reads(matcher, _ONE[form]) == "whole"
    assert held.reads(matcher, _TWO[form]) == "no"
    last = matcher.deep_copy()
    last.consume_tokens(held.tokenizer.encode(_ONE[form], add_special_tokens=False))
    assert last.is_stopped()


@pytest.mark.parametrize(
    ("asks", "good", "bad"),
    [
        (Constraint("json"), '{"is": [1, {}]}', "It is 1."),
        (
            constraint_of({"type": "json_schema", "json_schema": {"name": "person", "schema": _PERSON}}),
            '{"name": "Ida"}',
            '{"age": 3}',
        ),
        (Constraint("json_schema", json.dumps(_PERSON)), '{"name": "Ida"}', '{"age": 3}'),
        (Constraint("regex", r"(?:yes|no)/\d\\/"), "no/3\\/", "maybe"),
        (Constraint("lark", 'start: "{" WORD "}"\nWORD: /[a-z]+/'), "{word}", "{3}"),
    ],
    ids=["json", "closed-schema", "schema", "regex", "lark"],
)
def test_beside_an_answer_that_is_asked_for_only_calls_may_come(
    held: Held, form: str, asks: Constraint, good: str, bad: str
) -> None:
    matcher = held.grammar(_FORMS[form], asked(), asks)
    lead = "<|python_tag|>" if form == "llama3" else ""

    assert held.reads(matcher, good) == "whole"
    assert held.reads(matcher, bad) == "no"
    assert held.reads(matcher, lead + _TWO[form]) == "whole"
    assert held.reads(matcher, lead + _TWO[form].replace("query", "quarry")) == "no"


def test_an_answer_that_may_call_nothing_is_held_to_what_is_asked_for(form: str) -> None:
    asks = Constraint("json")

    for conversation in [asked("none"), asked(tools=())]:
        assert _FORMS[form].grammar(conversation, asks, {}) is asks
        assert _FORMS[form].grammar(conversation, None, {}) is None


def test_words_of_a_tools_schema_that_cannot_be_held_are_passed_over(held: Held, form: str) -> None:
    odd = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "pattern": "^(?!x)", "format": "colour"},
            "one": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "pattern": {"type": "object", "patternProperties": {r"(a)\\1": {}}},
        },
        "if": {"required": ["one"]},
    }
    matcher = held.grammar(_FORMS[form], asked("any", tools=(Tool("search", "", json.dumps(odd)), SEARCH_ALL)))

    call = _ONE[form].replace(ARGUMENTS, '{"query": "x", "one": 1.5}')
    assert held.reads(matcher, call) == "whole"


@pytest.mark.parametrize("choice", ["auto", "any", "search_all"])
def test_whatever_a_grammar_lets_through_is_read_as_calls_of_the_tools(held: Held, form: str, choice: str) -> None:
    made = _FORMS[form]
    matcher = held.grammar(made, asked(choice))
    begun = made.markers[0] if choice == "auto" else ""

    for seed in range(2):
        answer = _babble(held, matcher, begun, random.Random(seed))
        reader = made.reader(asked(choice).callable_tools)
        reader.feed(answer)
        reply = reader.finish()
        assert reply.tool_calls, answer
        assert not reply.invalid_tool_calls, answer
        assert not reply.text
        for call in reply.tool_calls:
            known = json.loads({"search": SEARCH, "search_all": SEARCH_ALL}[call.name].parameters)
            assert json.loads(call.arguments).keys() <= known["properties"].keys()


def _babble(held: Held, matcher: Any, begun: str, dice: random.Random) -> str:
    """An answer of any allowed tokens; it ends where it may."""
    matcher = matcher.deep_copy()
    tokens = held.tokenizer.encode(begun, add_special_tokens=False)
    matcher.consume_tokens(tokens)
    while not matcher.is_stopped() and (not matcher.is_accepting() or len(tokens) < 40):
        bits = matcher.compute_logit_bias()
        allowed = [token for token, bit in enumerate(bits) if bit and token != held.tokenizer.eos_token_id]
        if not allowed:
            break
        tokens.append(dice.choice(allowed))
        matcher.consume_token(tokens[-1])
        assert not matcher.is_error(), matcher.get_error()
    return str(held.tokenizer.decode(tokens, skip_special_tokens=False))
