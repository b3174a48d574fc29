"""FORM OF THE ANSWER -> GRAMMAR. What response_format and tool_choice ask of an answer."""

import json

from xverse.engine.form import Form, form_of
from xverse.errors import XverseError
from xverse.server.refusals import invalid, of_model, unsupported
from xverse.server.schema import NamedTool, ResponseFormat, Tool, ToolChoice

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 32


def answer_form(
    tools: list[Tool] | None, choice: ToolChoice | None, form: ResponseFormat | None
) -> Form:
    """How the answer gets the form that is asked for; Refusal for what cannot be asked."""
    check_tools(tools)
    check_choice(choice, tools)
    check_format(form)
    demanded = choice == "required" or isinstance(choice, NamedTool)
    for place, tool in enumerate(tools or ()):
        if tool.function.strict and not demanded:
            why = "an answer that may be a call or not is held to no schema."
            raise unsupported(f"tools[{place}].function.strict", why)
    try:
        return form_of(
            [tool.model_dump(exclude_none=True) for tool in tools or ()],
            choice.model_dump() if isinstance(choice, NamedTool) else choice,
            form.model_dump(by_alias=True, exclude_none=True) if form else None,
        )
    except XverseError as error:
        raise of_model(error, "tools" if demanded else "response_format") from error


def check_tools(tools: list[Tool] | None) -> None:
    """Refusal where a tool's schema is too large or nested too deeply, or two have one name."""
    names: set[str] = set()
    for place, tool in enumerate(tools or ()):
        _check_schema(tool.function.parameters or {}, f"tools[{place}].function.parameters")
        if tool.function.name in names:
            raise invalid(f"Two tools are called {tool.function.name!r}.", f"tools[{place}]")
        names.add(tool.function.name)


def check_choice(choice: ToolChoice | None, tools: list[Tool] | None) -> None:
    """Refusal where a tool is demanded that is not there."""
    if choice is None or choice in ("auto", "none"):
        return
    if not tools:
        raise invalid("tool_choice demands a tool, and there are no tools.", "tool_choice")
    if isinstance(choice, NamedTool):
        names = [tool.function.name for tool in tools]
        if choice.function.name not in names:
            raise invalid(f"There is no tool {choice.function.name!r}.", "tool_choice")


def check_format(form: ResponseFormat | None) -> None:
    """Refusal where type and schema do not go together, or the schema is too large."""
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
