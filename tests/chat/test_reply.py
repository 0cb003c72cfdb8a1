"""Reading answers as they come, in each of the forms."""

from __future__ import annotations

import json
import string
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_hub_sdk.chat.formats import ToolFormat
from lora_hub_sdk.chat.hermes import Hermes
from lora_hub_sdk.chat.llama3 import Llama3
from lora_hub_sdk.chat.mistral import Mistral
from lora_hub_sdk.chat.reply import Reply
from lora_hub_sdk.messages import InvalidToolCall, Piece, ToolCall, ToolCallPiece
from tests.chat.tools import ARGUMENTS, TOOLS

_FORMS: dict[str, ToolFormat] = {
    "hermes": Hermes(),
    "llama3": Llama3(),
    "mistral": Mistral(),
    "mistral-named": Mistral(named=True),
}
_Calls = list[tuple[str | None, str]]


def _read(form: ToolFormat, *texts: str) -> tuple[list[Piece], Reply]:
    """All pieces, and the reply."""
    reader = form.reader(TOOLS)
    pieces = [piece for text in texts for piece in reader.feed(text)]
    reply = reader.finish()
    return [*pieces, *reply.pieces], reply


def _told(pieces: list[Piece]) -> tuple[str, dict[int, ToolCallPiece]]:
    """The text and the calls that pieces make together."""
    calls: dict[int, ToolCallPiece] = {}
    for piece in pieces:
        if isinstance(piece, ToolCallPiece):
            before = calls.get(piece.index)
            assert (before is None) == (piece.id is not None)
            assert before is None or piece.name is None
            name, id_ = (piece.name, piece.id) if before is None else (before.name, before.id)
            arguments = (before.arguments if before else "") + piece.arguments
            calls[piece.index] = ToolCallPiece(piece.index, name, id_, arguments)
    return "".join(piece for piece in pieces if isinstance(piece, str)), calls


def _plain(reply: Reply) -> tuple[str, _Calls, _Calls]:
    """A reply without what is made up anew each time."""
    return (
        reply.text,
        [(call.name, call.arguments) for call in reply.tool_calls],
        [(call.name, call.arguments) for call in reply.invalid_tool_calls],
    )


@pytest.mark.parametrize("form", _FORMS.values(), ids=_FORMS)
def test_calls_that_were_written_are_read_again(form: ToolFormat) -> None:
    calls = [
        ToolCall("search", ARGUMENTS, "1"),
        ToolCall("search_all", "{}", "2"),
        ToolCall("search", '{"query": "]"}', "3"),
    ]

    _, reply = _read(form, form.written(calls))

    assert _plain(reply) == ("", [(call.name, call.arguments) for call in calls], [])
    assert len({call.id for call in reply.tool_calls}) == 3
    assert all(len(call.id) == 29 and call.id.startswith("call_") for call in reply.tool_calls)


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        ("hermes", "Wait.\n<tool_call>\n{}\n</tool_call> So.\n", "Wait.\n So.\n", 1),
        ("hermes", "<tool_call>{}</tool_call>\n<tool_call>{}</tool_call>\n", "", 2),
        ("hermes", "<tool_call>{}<tool_call>{}", "", 2),
        ("llama3", "\n{}; {}\n", "", 2),
        ("llama3", "{}\n{}", "", 2),
        ("llama3", "Wait. <|python_tag|>{};{}<|python_tag|>{}", "Wait.", 3),
        ("llama3", "{} So.", "So.", 1),
        ("mistral", "Wait. [TOOL_CALLS] [{}, {}]", "Wait.", 2),
        ("mistral", "[TOOL_CALLS][{}", "", 1),
        ("mistral", "[TOOL_CALLS][]", "", 0),
    ],
)
def test_text_and_calls_are_told_apart(form: str, answer: str, text: str, calls: int) -> None:
    word = "parameters" if form == "llama3" else "arguments"
    call = json.dumps({"name": "search", word: {"query": "</tool_call>"}})

    pieces, reply = _read(_FORMS[form], answer.replace("{}", call))

    assert _plain(reply) == (text, [("search", '{"query": "</tool_call>"}')] * calls, [])
    assert _told(pieces)[0] == text


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize(
    "answer", ["", " Hi. \n", "1 < 2 <tool [TOOL", "{", '{"is": 1} {', '{"name": "Ida", "age": 3}', '{"name": "Ida"}']
)
def test_text_without_calls_stays_as_it_is(form: str, answer: str) -> None:
    pieces, reply = _read(_FORMS[form], *answer)

    assert "".join(piece for piece in pieces if isinstance(piece, str)) == reply.text == answer
    assert not reply.tool_calls
    assert not reply.invalid_tool_calls


@pytest.mark.parametrize(
    ("form", "answer", "name", "arguments", "why"),
    [
        ("hermes", '<tool_call>{"name": "forget", "arguments": {}}</tool_call>', "forget", "{}", "no tool 'forget'"),
        ("hermes", '<tool_call>{"name": "search", "arguments": [1]}</tool_call>', "search", "[1]", "no JSON object"),
        ("hermes", '<tool_call>{"name": "search", "arguments": {"a" 1}}</tool_call>', "search", '{"a" 1}', "no JSON:"),
        ("hermes", '<tool_call>{"name": "search", "arguments": {b}}\n</tool_call>', "search", "{b}}", "'b' stands"),
        ("hermes", '<tool_call>{"name": "search", "arguments": {"a', "search", '{"a', "cut off"),
        ("hermes", '<tool_call>{"name": "search", "arg', "search", '{"name": "search", "arg', "cut off"),
        ("hermes", "<tool_call>search(1)</tool_call>", None, "search(1)", "expected {"),
        ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>', None, '{"a": 1}', "no name"),
        ("hermes", '<tool_call>{"name": "search", "arguments": {}}}</tool_call>', "search", "{}}}", "follows its JSON"),
        ("hermes", '<tool_call>{"name": "a", "name": "b"}</tool_call>', "a", '{"name": "a", "name": "b"}', "two names"),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', "?", "{}", "no tool"),
        ("hermes", "<tool_call>", None, "", "cut off"),
        ("llama3", '{"name": "forget", "parameters": {}}', "forget", "{}", "no tool 'forget'"),
        ("llama3", '{"name": "search", "para', "search", '{"name": "search", "para', "cut off"),
        ("llama3", "<|python_tag|>print(1)", None, "print(1)", "expected {"),
        ("mistral", "[TOOL_CALLS]sea rch[ARGS]{}", None, "sea rch[ARGS]{}", "' ' stands"),
        ("mistral", '[TOOL_CALLS]search[ARGS]{"a', "search", '{"a', "cut off"),
        ("mistral", '[TOOL_CALLS][{"name": "search", "arguments": {"a": nope}}]', "search", '{"a": nope}}]', "stands"),
    ],
)  # fmt: skip
def test_what_was_meant_as_a_call_and_is_none_is_kept_as_it_was_generated(
    form: str, answer: str, name: str | None, arguments: str, why: str
) -> None:
    pieces, reply = _read(_FORMS[form], *answer)

    assert not reply.tool_calls
    [call] = reply.invalid_tool_calls
    assert (call.name, call.arguments) == (name, arguments)
    assert why in call.error
    assert _told(pieces) == ("", {0: ToolCallPiece(0, name, call.id, arguments)})


def test_a_call_without_arguments_has_none() -> None:
    _, reply = _read(Hermes(), '<tool_call>{"name": "search_all"}</tool_call>')

    assert _plain(reply) == ("", [("search_all", "{}")], [])


def test_names_after_arguments_and_ids_of_the_models_own_change_nothing() -> None:
    _, turned = _read(
        Hermes(), '<tool_call>{"arguments": {"query": "x"}, "id": [{"a": "b"}], "name": "search"}</tool_call>'
    )
    _, with_id = _read(Mistral(), '[TOOL_CALLS]search[CALL_ID]a1B2c3D4e[ARGS]{"query": "x"}')

    assert _plain(turned) == _plain(with_id) == ("", [("search", '{"query": "x"}')], [])


def test_a_call_is_told_of_while_it_comes() -> None:
    reader = Hermes().reader(TOOLS)

    assert reader.feed("Well <tool") == ["Well"]
    assert reader.feed('_call>\n{"name": "sea') == []
    [begun] = reader.feed('rch", "argu')
    assert begun == ToolCallPiece(0, "search", begun.id if isinstance(begun, ToolCallPiece) else "")
    assert reader.feed('ments": {"query": ') == [ToolCallPiece(0, arguments='{"query": ')]
    assert reader.feed('"new"') == [ToolCallPiece(0, arguments='"new"')]
    assert reader.feed("}}\n</tool_call>") == [ToolCallPiece(0, arguments="}")]
    assert reader.finish().pieces == ()


def test_json_of_any_depth_or_size_is_no_error() -> None:
    for value in ["[" * 100_000, "9" * 10_000, '{"a": ' * 5_000 + "1" + "}" * 5_000]:
        _, reply = _read(Hermes(), f'<tool_call>{{"name": "search", "arguments": {value}}}</tool_call>')
        assert len(reply.invalid_tool_calls) == 1


#: What answers are made of, whole and broken.
_PARTS = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "\n", " ", ";", "Hi",
        "[", "]", "{", "}", ",", ":", '"', "\\", "<", "search", "forget", '"name"', '"arguments"', '"parameters"',
        '{"name": "search", "arguments": ', '{"name": "search", "parameters": ', '{"query": "x"}', "{}", "1", "null",
        '{"name": "search_all", "arguments": {}}', '"search"', '"type": 1', '"\\ud800"', '"x": ', "é",
    ]
)  # fmt: skip
_ANSWERS = st.lists(st.one_of(_PARTS, st.text(string.printable, max_size=3)), max_size=12).map("".join)


@pytest.mark.parametrize("form", _FORMS)
@settings(max_examples=150, deadline=None)
@given(answer=_ANSWERS, cuts=st.lists(st.integers(0, 60), max_size=6))
def test_any_text_is_read_and_the_same_however_it_is_split(form: str, answer: str, cuts: list[int]) -> None:
    at = sorted({0, *(cut for cut in cuts if cut < len(answer)), len(answer)})
    split = [answer[begin:end] for begin, end in pairwise(at)]

    _, whole = _read(_FORMS[form], answer)
    pieces, reply = _read(_FORMS[form], *split)
    text, told = _told(pieces)

    assert _plain(reply) == _plain(whole)
    assert text == reply.text
    calls: list[ToolCall | InvalidToolCall] = [*reply.tool_calls, *reply.invalid_tool_calls]
    assert sorted(told) == list(range(len(calls)))
    assert {(call.id, call.name, call.arguments) for call in told.values()} == {
        (call.id, call.name, call.arguments) for call in calls
    }
    for call in reply.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
