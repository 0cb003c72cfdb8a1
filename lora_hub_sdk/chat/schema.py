"""JSON schemas as answers are held to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

#: Of JSON. A model that may put in any amount of it may never stop doing so.
WHITE_SPACE: Final = r" ?|\r?\n[ \t]{0,40}"
#: Beside these, an object's own properties may not be all that it can have.
_OPEN: Final = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "$ref", "if", "not")
#: Integers up to this every reader of JSON has exactly (RFC 8259, section 6).
_LARGEST: Final = 2**53 - 1
#: Schemas by name.
_TABLES: Final = ("properties", "$defs", "definitions")
_SCHEMAS: Final = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
#: What expressions cannot have in llguidance: a look around, or back at a group. Pydantic's of decimals has it.
_AROUND: Final = re.compile(r"\(\?<?[=!]|\\[1-9]")


def held_schema(schema: Mapping[str, Any], *, of_call: bool = False) -> str:
    """A schema's text for llguidance: little white space, no unnamed properties, no endless integers.

    An object that may have others has to say so (``additionalProperties``): a model that may invent keys, or write any
    number of digits, may never come to an end. Schemas with ``allOf`` are left open, as objects may be put together of
    several there.

    Args:
        of_call: for a call's arguments. They come in one line, as models write them; and words that llguidance cannot
            hold to are passed over instead of refused.
    """
    held = _each(schema, _bound)
    if '"allOf"' not in json.dumps(schema):
        held = _each(held, _close)
    if of_call:
        held = _each(held, _leave_out_patterns)
    white_space = " ?" if of_call else WHITE_SPACE
    guidance = {"whitespace_pattern": white_space, "coerce_one_of": True, "lenient": of_call}
    return json.dumps({**held, "x-guidance": guidance}, ensure_ascii=False)


def _each(schema: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A schema in which each schema is changed."""
    if isinstance(schema, list):
        return [_each(one, change) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for key in _TABLES:
        if isinstance(made.get(key), Mapping):
            made[key] = {name: _each(one, change) for name, one in made[key].items()}
    for key in _SCHEMAS:
        if key in made:
            made[key] = _each(made[key], change)
    change(made)
    return made


def _close(schema: dict[str, Any]) -> None:
    if isinstance(schema.get("properties"), Mapping) and not schema.keys() & {*_OPEN}:
        schema["additionalProperties"] = False


def _bound(schema: dict[str, Any]) -> None:
    kinds = schema.get("type")
    if kinds != "integer" and not (isinstance(kinds, list) and "integer" in kinds and "number" not in kinds):
        return
    lower, upper = schema.keys() & {"minimum", "exclusiveMinimum"}, schema.keys() & {"maximum", "exclusiveMaximum"}
    large = any(isinstance(schema[key], int | float) and abs(schema[key]) > _LARGEST for key in lower | upper)
    if large or schema.keys() & {"enum", "const"}:
        return
    if not lower:
        schema["minimum"] = -_LARGEST
    if not upper:
        schema["maximum"] = _LARGEST


def _leave_out_patterns(schema: dict[str, Any]) -> None:
    if _looks_around(schema.get("pattern")):
        del schema["pattern"]
    names = schema.get("patternProperties")
    if isinstance(names, Mapping):
        schema["patternProperties"] = {name: one for name, one in names.items() if not _looks_around(name)}


def _looks_around(pattern: object) -> bool:
    return isinstance(pattern, str) and _AROUND.search(pattern) is not None
