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
#: Schemas by name.
_TABLES: Final = ("properties", "$defs", "definitions")
_SCHEMAS: Final = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
#: What expressions cannot have in llguidance: a look around, or back at a group. Pydantic's of decimals has it.
_AROUND: Final = re.compile(r"\(\?<?[=!]|\\[1-9]")


def held_schema(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """A schema's text for llguidance: little white space, and no properties that the schema does not name.

    An object that may have others has to say so (``additionalProperties``): a model that may invent keys may never come
    to an end. Schemas with ``allOf`` are left open, as objects may be put together of several there.

    Args:
        lenient: words that llguidance cannot hold an answer to are passed over instead of refused.
    """
    closed = schema if '"allOf"' in json.dumps(schema) else _each(schema, _close)
    if lenient:
        closed = _each(closed, _leave_out_patterns)
    guidance = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True, "lenient": lenient}
    return json.dumps({**closed, "x-guidance": guidance}, ensure_ascii=False)


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


def _leave_out_patterns(schema: dict[str, Any]) -> None:
    if _looks_around(schema.get("pattern")):
        del schema["pattern"]
    names = schema.get("patternProperties")
    if isinstance(names, Mapping):
        schema["patternProperties"] = {name: one for name, one in names.items() if not _looks_around(name)}


def _looks_around(pattern: object) -> bool:
    return isinstance(pattern, str) and _AROUND.search(pattern) is not None
