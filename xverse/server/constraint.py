"""FORM OF THE ANSWER -> GRAMMAR. What response_format and a forced tool_choice ask of an answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from xverse.engine.grammar import Grammar
from xverse.errors import XverseError
from xverse.server.refusals import invalid, of_model, unsupported
from xverse.server.schema import NamedTool, ResponseFormat, Tool, ToolChoice

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 32


@dataclass(frozen=True)
class Constraint:
    """What the answer is held to; with `forced` it is one function call, bare of its marks."""

    grammar: Grammar | None = None
    forced: bool = False


def constrain(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, form: ResponseFormat | None
) -> Constraint:
    """What tools, tool_choice and response_format demand together; Refusal where they cannot."""
    check_tools(tools)
    demanded = _demanded(tools or (), choice)
    wanted = _of_format(form)
    if not demanded:
        for place, tool in enumerate(tools or ()):
            if tool.function.strict and choice != "none":
                raise unsupported(
                    f"tools[{place}].function.strict",
                    "only a call that tool_choice demands is held to its schema.",
                )
        if wanted is not None and tools and choice != "none":
            raise unsupported(
                "response_format",
                'beside tools that may be called; set tool_choice to "none", or leave one out.',
            )
        return Constraint(wanted)
    if wanted is not None:
        raise invalid("An answer is a call or of a format, not both.", "response_format")
    return Constraint(_call_grammar(demanded), forced=True)


def check_tools(tools: Sequence[Tool] | None) -> None:
    """Refusal where a tool's schema is too large or nested too deeply, or two have one name."""
    names: set[str] = set()
    for place, tool in enumerate(tools or ()):
        _check_schema(tool.function.parameters or {}, f"tools[{place}].function.parameters")
        if tool.function.name in names:
            raise invalid(f"Two tools are called {tool.function.name!r}.", f"tools[{place}]")
        names.add(tool.function.name)


def _demanded(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The tools of which one has to be called; none where the model may decide."""
    if choice is None or choice in ("auto", "none"):
        return []
    if not tools:
        raise invalid("tool_choice demands a tool, and there are no tools.", "tool_choice")
    if not isinstance(choice, NamedTool):
        return list(tools)
    found = [tool for tool in tools if tool.function.name == choice.function.name]
    if not found:
        raise invalid(f"There is no tool {choice.function.name!r}.", "tool_choice")
    return found


def _of_format(form: ResponseFormat | None) -> Grammar | None:
    if form is None:
        return None
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise invalid(
            "json_schema belongs to the type json_schema, and to no other.",
            "response_format.json_schema",
        )
    if form.json_schema is None:
        return Grammar.json() if form.type == "json_object" else None
    param = "response_format.json_schema.schema"
    _check_schema(form.json_schema.schema_, param)
    return _of_schema(form.json_schema.schema_, param)


def _call_grammar(tools: Sequence[Tool]) -> Grammar:
    """A call of one of these, as the JSON that stands between the marks of a call."""
    definitions: dict[str, object] = {}
    calls: list[dict[str, object]] = []
    for tool in tools:
        schema = dict(tool.function.parameters or {"type": "object", "properties": {}})
        for key in ("$defs", "definitions"):  # references lead there from the root
            inner = schema.pop(key, {})
            known = definitions.setdefault(key, {})
            assert isinstance(known, dict)
            for name, definition in inner.items() if isinstance(inner, dict) else ():
                if known.setdefault(name, definition) != definition:
                    raise unsupported("tools", f"two of them mean other things by {name!r:.80}.")
        calls.append(
            {
                "type": "object",
                "properties": {"api_name": {"const": tool.function.name}, "parameters": schema},
                "required": ["api_name", "parameters"],
            }
        )
    body = calls[0] if len(calls) == 1 else {"anyOf": calls}
    kept = {key: found for key, found in definitions.items() if found}
    return _of_schema({**body, **kept}, "tools")


def _of_schema(schema: dict[str, object], param: str) -> Grammar:
    try:
        return Grammar.json_schema(schema)
    except XverseError as error:
        raise of_model(error, param) from error


def _check_schema(schema: dict[str, object], param: str) -> None:
    if len(json.dumps(schema, ensure_ascii=False).encode()) > MAX_SCHEMA_BYTES:
        raise invalid(f"{param}: a schema may have {MAX_SCHEMA_BYTES} bytes.", param)
    level: list[object] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise invalid(f"{param}: a schema may be nested {MAX_SCHEMA_DEPTH} levels deep.", param)


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
