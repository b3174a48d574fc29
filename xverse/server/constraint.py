"""FORM OF THE ANSWER -> GRAMMAR. What response_format and a forced tool_choice ask of an answer."""

import json

from xverse.server.refusals import invalid, unsupported
from xverse.server.schema import NamedTool, ResponseFormat, Tool, ToolChoice

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 32
NO_GRAMMAR = "this version cannot hold an answer to a grammar yet."


def check_tools(tools: list[Tool] | None) -> None:
    """Refusal where a tool's schema is too large or nested too deeply, or two have one name."""
    names: set[str] = set()
    for place, tool in enumerate(tools or ()):
        _check_schema(tool.function.parameters or {}, f"tools[{place}].function.parameters")
        if tool.function.strict:
            raise unsupported(f"tools[{place}].function.strict", NO_GRAMMAR)
        if tool.function.name in names:
            raise invalid(f"Two tools are called {tool.function.name!r}.", f"tools[{place}]")
        names.add(tool.function.name)


def check_choice(choice: ToolChoice | None, tools: list[Tool] | None) -> None:
    """Refusal where a tool is demanded that is not there, or cannot be demanded."""
    if choice is None or choice in ("auto", "none"):
        return
    if not tools:
        raise invalid("tool_choice demands a tool, and there are no tools.", "tool_choice")
    if isinstance(choice, NamedTool):
        names = [tool.function.name for tool in tools]
        if choice.function.name not in names:
            raise invalid(f"There is no tool {choice.function.name!r}.", "tool_choice")
    raise unsupported("tool_choice", NO_GRAMMAR)


def check_format(form: ResponseFormat | None) -> None:
    """Refusal where the answer cannot be held to this form."""
    if form is None or form.type == "text":
        if form is not None and form.json_schema is not None:
            raise invalid("A text has no json_schema.", "response_format.json_schema")
        return
    if (form.type == "json_schema") != (form.json_schema is not None):
        raise invalid(
            "json_schema belongs to the type json_schema, and to no other.",
            "response_format.json_schema",
        )
    if form.json_schema is not None:
        _check_schema(form.json_schema.schema_, "response_format.json_schema.schema")
    raise unsupported("response_format", NO_GRAMMAR)


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
