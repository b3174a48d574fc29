"""SCHEMA -> OBJECTS. The three ways in which LangChain asks for answers of a schema."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal, Protocol, get_args

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.base import OutputParserLike
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from xverse.errors import XverseError

Method = Literal["function_calling", "json_schema", "json_mode"]
Structured = Runnable[LanguageModelInput, dict[str, Any] | BaseModel]


class Binds(Protocol):
    """A chat model that words can be bound to."""

    def bind_tools(self, tools: Any, **words: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """With tools."""
        ...

    def bind(self, **words: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """With anything."""
        ...


def structured(
    model: Binds,
    schema: dict[str, Any] | type,
    method: Method,
    *,
    include_raw: bool,
    strict: bool | None,
    more: Mapping[str, Any],
) -> Structured:
    """The model, and behind it the parser that makes objects of its answers."""
    if method not in get_args(Method):
        raise XverseError(
            f"There is no method {method!r:.60}.",
            "An answer gets its form by a function call or by its format.",
            f"Use one of {', '.join(get_args(Method))}.",
        )
    if method == "json_mode" and strict is not None:
        raise XverseError(
            "strict is not for json_mode.",
            "That mode always takes the schema as it stands.",
            'Leave strict out, or use method="json_schema".',
        )
    noted = {
        "kwargs": {"method": method, "strict": strict},
        "schema": convert_to_json_schema(schema),
    }
    if method == "function_calling":
        asked = model.bind_tools(
            [schema], tool_choice="any", strict=strict, ls_structured_output_format=noted, **more
        )
        return _parsed(asked, _call_parser(schema), include_raw=include_raw)
    described = convert_to_json_schema(schema, strict=strict)
    form = {"name": _name(described), "schema": described}
    asked = model.bind(
        response_format={"type": "json_schema", "json_schema": form},
        ls_structured_output_format=noted,
        **more,
    )
    return _parsed(asked, _text_parser(schema), include_raw=include_raw)


def _name(schema: Mapping[str, Any]) -> str:
    """A name that servers take: letters, digits, "_" and "-"."""
    title = str(schema.get("title") or "answer")
    kept = [letter if letter.isascii() and letter.isalnum() else "_" for letter in title]
    return "".join(kept)[:64]


def _call_parser(schema: dict[str, Any] | type) -> OutputParserLike[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    name = convert_to_openai_tool(schema)["function"]["name"]
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _text_parser(schema: dict[str, Any] | type) -> OutputParserLike[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _parsed(
    asked: Runnable[LanguageModelInput, AIMessage],
    parser: OutputParserLike[Any],
    *,
    include_raw: bool,
) -> Structured:
    if not include_raw:
        return asked | parser
    good = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    bad = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=asked) | good.with_fallbacks([bad], exception_key="parsing_error")
