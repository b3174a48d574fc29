"""OPENAI'S WORDS -> GRAMMAR. What tool_choice and response_format ask of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xverse.engine.grammar import Grammar
from xverse.errors import XverseError
from xverse.text.tools import START

Schema = Mapping[str, object]

# What a call begins with in the published transcript. The model goes on with its JSON.
CALL_OPENING = f"{START}```JSON\n"
_WITHOUT_REFERENCES = frozenset({"enum", "const", "default", "example", "examples"})


@dataclass(frozen=True)
class Form:
    """How an answer is made to have a form. `opening` is its first text, which the model is given
    as if it had said it; the rest is held to `grammar`."""

    opening: str = ""
    grammar: Grammar | None = None


FREE = Form()


def form_of(
    tools: Sequence[Schema], tool_choice: object = None, response_format: Schema | None = None
) -> Form:
    """The form of an answer to a request that says this, in OpenAI's words.

    A demanded call ("required", or {"type": "function", "function": {"name": ...}}) is exactly one,
    and its arguments keep to the tool's schema. XverseError for what cannot be demanded.
    """
    wanted = _wanted(tools, tool_choice)
    if wanted:
        return Form(CALL_OPENING, Grammar.json_schema(_call_schema(wanted)))
    form = _form_of_format(response_format)
    if form.grammar is not None and tools and tool_choice != "none":
        raise XverseError(
            "An answer cannot be a call or not, and JSON of a form as well.",
            "response_format holds the whole answer to its form, and a call is none of it.",
            'Give tool_choice "none" or "required", or ask without response_format.',
        )
    return form


def _wanted(tools: Sequence[Schema], tool_choice: object) -> list[Schema]:
    """The functions one of which has to be called; none where calls are free or forbidden."""
    functions = [_function(tool) for tool in tools]
    if tool_choice in (None, "auto", "none"):
        return []
    if not functions:
        raise XverseError(
            "A function call is demanded, and there are no tools.",
            f"tool_choice is {tool_choice!r:.80}.",
            "Give the tools, or leave tool_choice out.",
        )
    if tool_choice == "required":
        return functions
    name = _function(tool_choice).get("name") if isinstance(tool_choice, Mapping) else None
    named = [function for function in functions if function.get("name") == name]
    if not named:
        raise XverseError(
            f"This call cannot be demanded: {tool_choice!r:.80}.",
            f"The tools are {', '.join(str(function.get('name')) for function in functions)}.",
            'Give "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.',
        )
    return named[:1]


def _function(tool: Schema) -> Schema:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def _call_schema(functions: Sequence[Schema]) -> dict[str, object]:
    """Schema of a call of one of these, in the published markup's words.

    Each function's parameters become a definition, since what they refer to is theirs alone.
    """
    definitions: dict[str, object] = {}
    calls: list[dict[str, object]] = []
    for place, function in enumerate(functions):
        definitions |= _definitions(function, str(place))
        call: dict[str, object] = {
            "type": "object",
            "properties": {
                "api_name": {"const": function["name"]},
                "parameters": {"$ref": f"#/$defs/{place}"},
            },
            "required": ["api_name", "parameters"],
        }
        calls.append(call)
    form = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**form, "$defs": definitions}


def _definitions(function: Schema, name: str) -> dict[str, object]:
    """The parameters of a function under a name, and what they define under names after it."""
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise XverseError(
            f"The tool {function.get('name')!r:.60} has no schema.",
            f"Its parameters are {schema!r:.60}.",
            "Give a JSON schema of an object.",
        )
    found = {name: _renamed({k: v for k, v in schema.items() if k not in _HOMES}, name)}
    for home in _HOMES:
        inner = schema.get(home)
        for key, value in inner.items() if isinstance(inner, Mapping) else ():
            found[f"{name}.{key}"] = _renamed(value, name)
    return found


_HOMES = ("$defs", "definitions")


def _renamed(value: object, name: str) -> object:
    """A part of a schema with its references pointing to where `_definitions` puts things."""
    if isinstance(value, list):
        return [_renamed(part, name) for part in value]
    if not isinstance(value, Mapping):
        return value
    renamed: dict[str, object] = {}
    for key, part in value.items():
        if key == "$ref" and isinstance(part, str):
            renamed[key] = _pointed(part, name)
        else:
            renamed[key] = part if key in _WITHOUT_REFERENCES else _renamed(part, name)
    return renamed


def _pointed(reference: str, name: str) -> str:
    if reference == "#":
        return f"#/$defs/{name}"
    for home in _HOMES:
        if reference.startswith(f"#/{home}/"):
            return f"#/$defs/{name}.{reference.removeprefix(f'#/{home}/')}"
    return reference  # a Grammar refuses it, and names it


def _form_of_format(response_format: Schema | None) -> Form:
    kind = "text" if response_format is None else response_format.get("type")
    if response_format is None or kind == "text":
        return FREE
    if kind == "json_object":
        return Form(grammar=Grammar.json())
    described = response_format.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise XverseError(
            f"This is no form of an answer: {dict(response_format)!r:.80}.",
            "response_format is of type text, json_object or json_schema.",
            'Give {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}.',
        )
    return Form(grammar=Grammar.json_schema(schema))
