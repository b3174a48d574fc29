"""OpenAI's words for the form of an answer become grammars."""

import json

import pytest

from xverse.engine.form import CALL_OPENING, FREE, Form, form_of
from xverse.engine.grammar import Grammar
from xverse.errors import XverseError

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "$defs": {"city": {"enum": ["上海", {"$ref": "#/$defs/city"}]}},
}
TREE = {
    "type": "object",
    "properties": {"left": {"$ref": "#"}, "$ref": {"type": "string"}},
    "required": [],
}


def tool(name: str, parameters: object = None) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def schema_of(form: Form) -> dict[str, object]:
    assert form.grammar is not None
    assert form.grammar.kind == "json_schema"
    found: dict[str, object] = json.loads(form.grammar.text)
    return found


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_free_answer_has_no_form(choice: str | None) -> None:
    assert form_of([tool("a")], choice) == FREE
    assert form_of([], choice, {"type": "text"}) == FREE


def test_a_named_call_is_of_that_function_and_its_references_are_its_own() -> None:
    named = {"type": "function", "function": {"name": "b"}}
    form = form_of([tool("a", TREE), tool("b", CITY)], named)
    assert form.opening == CALL_OPENING
    schema = schema_of(form)
    assert schema["properties"]["api_name"] == {"const": "b"}  # type: ignore[index]
    definitions = schema["$defs"]
    assert definitions["0"]["properties"]["city"] == {"$ref": "#/$defs/0.city"}  # type: ignore[index]
    # A value that looks like a reference is a value.
    assert definitions["0.city"] == CITY["$defs"]["city"]  # type: ignore[index]


def test_a_demanded_call_is_of_any_function() -> None:
    schema = schema_of(form_of([tool("a", TREE), tool("b")], "required"))
    names = [call["properties"]["api_name"]["const"] for call in schema["anyOf"]]  # type: ignore[attr-defined]
    assert names == ["a", "b"]
    properties = schema["$defs"]["0"]["properties"]  # type: ignore[index]
    assert properties == {"left": {"$ref": "#/$defs/0"}, "$ref": {"type": "string"}}


def test_json_and_a_schema() -> None:
    assert form_of([], None, {"type": "json_object"}) == Form(grammar=Grammar.json())
    asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": TREE}}
    assert form_of([], None, asked).grammar == Grammar.json_schema(TREE)


@pytest.mark.parametrize(
    ("tools", "choice", "form", "word"),
    [
        ([], "required", None, "no tools"),
        ([tool("a")], "sometimes", None, "cannot be demanded"),
        ([tool("a")], {"type": "function", "function": {"name": "b"}}, None, "cannot be demanded"),
        ([tool("a", ["city"])], "required", None, "no schema"),
        ([tool("a")], "auto", {"type": "json_object"}, "cannot be a call"),
        ([], None, {"type": "xml"}, "no form"),
        ([], None, {"type": "json_schema"}, "no form"),
    ],
)
def test_what_cannot_be_is_refused(
    tools: list[dict[str, object]], choice: object, form: dict[str, object] | None, word: str
) -> None:
    with pytest.raises(XverseError, match=word):
        form_of(tools, choice, form)
