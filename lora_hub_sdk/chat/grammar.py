"""Grammars of answers with calls, in llguidance's Lark. Each call is held to its own tool's schema."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from lora_hub_sdk.chat.schema import WHITE_SPACE, held_schema
from lora_hub_sdk.messages import Conversation
from lora_hub_sdk.types import Constraint


def literal(text: str) -> str:
    """A text as a grammar has it."""
    return json.dumps(text, ensure_ascii=False)


def marker(text: str, special: Mapping[str, int]) -> str:
    """A marker as a grammar has it: by its number where it is a special token, and no text that could be spelled."""
    return f"<[{special[text]}]>" if text in special else literal(text)


def up_to(count: int, rule: str) -> str:
    """What may follow so many times, or not at all."""
    return f" ({rule}){{0,{count}}}" if count else ""


def calls_grammar(
    conversation: Conversation,
    answer: Constraint | None,
    special: Mapping[str, int],
    *,
    opener: str,
    calls: str,
    call: Callable[[str, str], str],
    bare: str | None = None,
) -> Constraint | None:
    """What an answer may be: text, or what ``answer`` asks for, or calls, by the conversation's choice.

    Text may come before calls and not after them, so that an answer with its last call is complete.

    Args:
        opener: the marker that calls begin with.
        calls: what follows it; one call is the rule ``call``.
        call: one tool's call, of its name and the rule of its arguments.
        bare: where calls may also begin without ``opener``: an expression of what begins like one, and so has to be it.
    """
    tools = conversation.callable_tools
    if not tools:
        return answer
    opening = marker(opener, special)
    rules = [f"calls: {calls}", f"call: {' | '.join(call(tool.name, f'args_{at}') for at, tool in enumerate(tools))}"]
    rules += [
        f"args_{at}: %json {held_schema(json.loads(tool.parameters), of_call=True)}" for at, tool in enumerate(tools)
    ]
    # Without its opener, a call could not be told from an answer that is JSON.
    ways = ["calls"] if bare and not (answer and not conversation.must_call) else []
    if conversation.must_call:
        ways.append(f"{opening} calls")
    elif answer is not None:
        ways += ["answer", f"{opening} calls"]
        rules.append(f"answer: {_answer(answer)}")
    else:
        ways += ["TEXT?", "lead calls"]
        no_call = f" & ~/(?:{bare})(?s:.*)/" if bare else ""
        rules.append(f"TEXT: /(?s:.+)/{no_call}")
        if opener in special:
            rules.append(f"lead: TEXT? {opening}")
        else:
            rules += [f"LEAD: /(?s:.*){_escaped(opener)}/{no_call}", "lead[lazy]: LEAD"]
    return Constraint("lark", "\n".join([f"start: {' | '.join(ways)}", *rules, ""]))


def _answer(answer: Constraint) -> str:
    match answer.kind:
        case "json":
            return f"%json {held_schema({'type': 'object'})}"
        case "json_schema":
            return f"%json {_spaced(answer.text)}"
        case "regex":
            return f"/{_in_slashes(answer.text)}/"
        case "lark":
            return f"%lark {{\n{answer.text}\n}}"


def _spaced(schema: str) -> str:
    # A schema that is none is for the compiler to refuse.
    try:
        return json.dumps({"x-guidance": {"whitespace_pattern": WHITE_SPACE}, **json.loads(schema)})
    except (TypeError, ValueError, RecursionError):
        return schema


def _escaped(text: str) -> str:
    return _in_slashes(re.sub(r"[^A-Za-z0-9_ <>]", r"\\\g<0>", text))


def _in_slashes(pattern: str) -> str:
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n")
