"""A schema is promised or refused in words, whatever stands where in it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from xverse.engine.form import form_of
from xverse.engine.grammar import Grammar
from xverse.errors import XverseError

SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {
            "a": {"type": ["integer", "null"], "minimum": 1, "maximum": 5},
            "b": {"type": "array", "items": {"$ref": "#/$defs/c"}, "minItems": 1},
            "d": {"type": "array", "prefixItems": [{"type": "boolean"}], "items": False},
            "e": {"anyOf": [{"enum": ["x", 1]}, {"const": None}]},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"c": {"type": "string", "minLength": 1, "maxLength": 3}},
    },
    {"type": "object", "patternProperties": {"^a$": {"type": "string", "pattern": "^[a-c]+$"}}},
    {"type": "object", "propertyNames": {"pattern": "^a+$"}},
    {"type": "string", "format": "date"},
    {"allOf": [{"type": "integer", "multipleOf": 3}]},
)
WRONG = (
    None,
    True,
    0.5,
    -1,
    10**30,
    "",
    "nothing",
    "#/$defs/none",
    [],
    [[]],
    {},
    {"type": {}},
    [1],
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:40])
def test_whatever_stands_where_is_taken_or_refused(schema: dict[str, Any]) -> None:
    Grammar.json_schema(schema)
    refused = 0
    for number in range(len(list(places(schema)))):
        for wrong in WRONG:
            changed = copy.deepcopy(schema)
            holder, key = list(places(changed))[number]
            holder[key] = wrong
            tool = {"type": "function", "function": {"name": "f", "parameters": changed}}
            for ask in (
                lambda: Grammar.json_schema(changed),  # noqa: B023
                lambda: form_of([tool], "required"),  # noqa: B023
            ):
                try:
                    ask()
                except XverseError:
                    refused += 1
    assert refused


@pytest.mark.parametrize("kind", [0.5, "text", [], ["string", 1], {}])
def test_a_type_that_is_none_is_named(kind: object) -> None:
    with pytest.raises(XverseError, match="no type"):
        Grammar.json_schema({"type": kind, "properties": {}})
