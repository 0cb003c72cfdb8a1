"""Answers in the form of a schema: what the model is asked for it, and how its answer is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any, Final, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from lora_hub_sdk.errors import ConfigurationError

Method = Literal["function_calling", "json_schema", "json_mode"]
#: A JSON schema, a tool in OpenAI's form, a ``TypedDict``, or a pydantic class.
Schema = Mapping[str, Any] | type

_METHODS: Final = ("function_calling", "json_schema", "json_mode")


def check_method(method: str, strict: bool | None) -> None:
    """
    Raises:
        ConfigurationError: an unknown method, or ``strict`` for one that holds to no schema.
    """
    if method not in _METHODS:
        raise ConfigurationError(f"method={method!r}: expected one of {', '.join(_METHODS)}")
    if method == "json_mode" and strict:
        raise ConfigurationError('strict=True: method="json_mode" holds to no schema; use "json_schema"')


def response_format_of(given: object, *, strict: bool | None = None) -> Any:
    """``response_format`` in OpenAI's form: what is in it already stays, a schema is put into it."""
    if given is None or (isinstance(given, Mapping) and given.get("type") in ("text", "json_object", "json_schema")):
        return given
    if isinstance(given, type) and is_basemodel_subclass(given) and issubclass(given, BaseModel):
        schema, name = given.model_json_schema(), given.__name__
    elif isinstance(given, Mapping | type):
        schema = convert_to_json_schema(dict(given) if isinstance(given, Mapping) else given)
        name = schema["title"]
    else:
        return given  # for openai_form to refuse
    asked = {"name": name, "schema": schema}
    return {"type": "json_schema", "json_schema": asked if strict is None else {**asked, "strict": strict}}


def traced(schema: Schema, method: Method, strict: bool | None) -> dict[str, Any]:
    """What a tracer is told of the form that is asked for."""
    return {"kwargs": {"method": method, "strict": strict}, "schema": schema}


def reader_of(schema: Schema, method: Method, *, include_raw: bool) -> Runnable[Any, Any]:
    """Reads an answer. With ``include_raw`` it takes ``{"raw": answer}`` and never raises."""
    parser: Runnable[Any, Any] = RunnableGenerator(_whole, _awhole) | _parser(schema, method)
    if not include_raw:
        return parser
    read = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return read.with_fallbacks([failed], exception_key="parsing_error")


def structured(
    model: Runnable[LanguageModelInput, AIMessage], schema: Schema, method: Method, *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """A model that was asked for a schema, and what reads its answers."""
    reader = reader_of(schema, method, include_raw=include_raw)
    return RunnableMap(raw=model) | reader if include_raw else model | reader


def _parser(schema: Schema, method: Method) -> Runnable[Any, Any]:
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        if is_class:
            return PydanticToolsParser(tools=[schema], first_tool_only=True)  # type: ignore[list-item]
        return JsonOutputKeyToolsParser(key_name=tool_of(schema)["function"]["name"], first_tool_only=True)
    pydantic_class: Any = schema
    return PydanticOutputParser(pydantic_object=pydantic_class) if is_class else JsonOutputParser()


def tool_of(
    given: Mapping[str, Any] | type | Callable[..., Any] | BaseTool, *, strict: bool | None = None
) -> dict[str, Any]:
    """Anything that LangChain takes for a tool, in OpenAI's form.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        return convert_to_openai_tool(given, strict=strict)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{str(given)[:120]} cannot be made into a tool: {error}") from error


def _whole(answers: Iterator[AIMessage]) -> Iterator[AIMessage]:
    """The same answers; LangChain's parsers would make something of half an answer, or silently nothing."""
    for answer in answers:
        yield answer
        _check_whole(answer)


async def _awhole(answers: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
    async for answer in answers:
        yield answer
        _check_whole(answer)


def _check_whole(answer: AIMessage) -> None:
    if answer.response_metadata.get("finish_reason") == "length":
        raise OutputParserException(
            "the answer was cut off at its greatest length before it was complete; give a larger max_new_tokens",
            llm_output=answer.text,
        )
