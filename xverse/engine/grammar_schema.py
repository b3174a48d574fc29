"""JSON SCHEMA -> YES OR NO. Whether every word of a schema will be obeyed; none is ignored."""

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from xverse.engine.grammar_regex import check_regex
from xverse.errors import XverseError
from xverse.files import parse_json

MAX_DEPTH = 32
Schema = Mapping[str, Any]

# Say something about a schema and nothing about which values it takes.
_REMARKS = frozenset(
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly"}
    | {"writeOnly", "discriminator", "$schema", "$id", "$comment", "$defs", "definitions"}
)
# Keywords that constrain, and the type of values they are about.
_ABOUT = {
    "properties": "object",
    "required": "object",
    "additionalProperties": "object",
    "patternProperties": "object",
    "propertyNames": "object",
    "minProperties": "object",
    "maxProperties": "object",
    "items": "array",
    "prefixItems": "array",
    "minItems": "array",
    "maxItems": "array",
    "minLength": "string",
    "maxLength": "string",
    "pattern": "string",
    "format": "string",
    "minimum": "number",
    "maximum": "number",
    "exclusiveMinimum": "number",
    "exclusiveMaximum": "number",
    "multipleOf": "integer",
}
# A schema has one of these, and beside it only remarks (and a type beside values).
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_FORMATS = frozenset(
    {"date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
    | {"uri-reference", "uri-template"}  # json-pointer comes out with raw control characters
)
# A pattern's literal of a character that JSON escapes comes out as it is.
_UNESCAPED = re.compile(r'["\x00-\x1f]|\\[\\nrtfv0xuc]')
_PLAIN = r'[^"\\\x00-\x1f]'  # a character that JSON does not escape, as a regex
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}


def check_schema(text: str) -> None:
    """XverseError where it is no schema, is nested deeper than 32, or has words that the compiled
    grammar would not obey: they are named, with the place."""
    try:
        schema = parse_json(text.encode())
    except ValueError as error:
        raise XverseError(
            "The JSON schema cannot be read.", str(error), "Give a JSON object."
        ) from error
    if _depth(schema) > MAX_DEPTH:
        raise XverseError(
            "The JSON schema is nested too deep.",
            f"At most {MAX_DEPTH} levels are taken.",
            "Put inner parts into $defs, and refer to them with $ref.",
        )
    _check(schema, "#")


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def _check(schema: object, place: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        _refuse(place, f"a schema is an object, not {schema!r:.40}")
    _check_type(schema.get("type"), f"{place}/type")
    for name in ("$defs", "definitions"):
        for key, inner in _mapping(schema, name, place).items():
            _check(inner, f"{place}/{name}/{key}")
    alone = [word for word in _ALONE if word in schema]
    words = set(schema) - _REMARKS
    if alone:
        beside = words - {alone[0]} - ({"type"} if alone[0] in ("enum", "const") else set())
        if beside:
            _refuse(f"{place}/{alone[0]}", f"{sorted(beside)[0]!r:.60} beside it is not obeyed")
        _check_alone(schema, alone[0], place)
        return
    unknown = words - set(_ABOUT) - {"type", "uniqueItems"}
    if unknown:
        _refuse(place, f"the keyword {sorted(unknown)[0]!r:.60} is not obeyed")
    if schema.get("uniqueItems", False) is not False:
        _refuse(place, "the keyword 'uniqueItems' is not obeyed")
    for word in sorted(words & set(_ABOUT)):
        _check_about(schema, word, place)
    _check_object(schema, place)
    _check_text(schema, place)
    for name in ("items", "additionalProperties"):
        if name in schema:
            _check(schema[name], f"{place}/{name}")
    items = schema.get("prefixItems", [])
    if not isinstance(items, list):
        _refuse(f"{place}/prefixItems", "a list of schemas is expected")
    for at, inner in enumerate(items):
        _check(inner, f"{place}/prefixItems/{at}")


def _check_type(value: object, place: str) -> None:
    names = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [name for name in names if not (isinstance(name, str) and name in _TYPES)]
    if wrong or value == []:
        _refuse(place, f"there is no type {(wrong or [value])[0]!r:.60}")


def _check_alone(schema: Schema, word: str, place: str) -> None:
    value, place = schema[word], f"{place}/{word}"
    if word == "$ref":
        if not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
            _refuse(place, f"{value!r:.60} is outside of this schema")
    elif word in ("enum", "const"):
        values = value if word == "enum" else [value]
        if not isinstance(values, list):
            _refuse(place, "a list of values is expected")
        types = _types(schema)
        if types and not all(any(_is(item, name) for name in types) for item in values):
            _refuse(place, "a value is not of the type beside it")
    else:
        if not isinstance(value, list) or not value:
            _refuse(place, "a list of schemas is expected")
        if word == "allOf" and len(value) > 1:
            _refuse(place, "schemas are not merged: write what they have in common as one")
        for at, inner in enumerate(value):
            _check(inner, f"{place}/{at}")


def _check_about(schema: Schema, word: str, place: str) -> None:
    about, types = _ABOUT[word], _types(schema)
    if "properties" in schema and not types:
        types = ("object",)  # so it is compiled
    if not ({about, "integer" if about == "number" else about} & set(types)):
        _refuse(f"{place}/{word}", f"it needs the type {about!r} beside it")
    if about == "integer" and "number" in types:
        _refuse(f"{place}/{word}", "it is obeyed for integers only")
    if about == "integer" and any("imum" in other for other in schema):
        _refuse(f"{place}/{word}", "it is not obeyed beside a minimum or maximum")


def _check_object(schema: Schema, place: str) -> None:
    properties = _mapping(schema, "properties", place)
    for name, inner in properties.items():
        _check(inner, f"{place}/properties/{name}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not set(map(str, required)) <= set(properties):
        _refuse(f"{place}/required", "it names what is not among the properties")
    patterns = _mapping(schema, "patternProperties", place)
    if "patternProperties" in schema or "propertyNames" in schema:
        if {"properties", "additionalProperties"} & set(schema) or len(patterns) > 1:
            _refuse(place, "patterns of names are obeyed only where nothing else names properties")
        for pattern, inner in patterns.items():
            _check_pattern(pattern, f"{place}/patternProperties")
            _check(inner, f"{place}/patternProperties/{pattern}")
    names = _mapping(schema, "propertyNames", place)
    if "propertyNames" in schema and set(names) != {"pattern"}:
        _refuse(f"{place}/propertyNames", "it may have a pattern and nothing else")
    if names:
        _check_pattern(names["pattern"], f"{place}/propertyNames")


def _check_text(schema: Schema, place: str) -> None:
    shaped = [word for word in ("pattern", "format") if word in schema]
    lengths = [word for word in ("minLength", "maxLength") if word in schema]
    if len(shaped) + bool(lengths) > 1:
        _refuse(place, f"the keyword {(lengths + shaped)[0]!r} is not obeyed beside {shaped[-1]!r}")
    least, most = (schema.get(word, low) for word, low in (("minLength", 0), ("maxLength", 2**31)))
    if not (type(least) is int and type(most) is int and 0 <= least <= most):
        _refuse(place, "lengths are whole numbers, the least not above the most")
    if "pattern" in shaped:
        _check_pattern(schema["pattern"], place)
    form = schema.get("format")
    if "format" in shaped and not (isinstance(form, str) and form in _FORMATS):
        _refuse(place, f"the format {form!r:.60} is not obeyed")


def _check_pattern(pattern: object, place: str) -> None:
    if not isinstance(pattern, str):
        _refuse(place, "a pattern is a text")
    if found := _UNESCAPED.search(pattern):
        _refuse(place, f"the pattern has {found[0]!r}, which would not be escaped in JSON")
    try:
        check_regex(pattern)
    except XverseError as error:
        _refuse(place, error.what)


def without_lengths(text: str) -> str:
    """A checked schema, with patterns in the place of the lengths of strings.

    xgrammar's own form of these lets raw control characters through. Like it, this one leaves out
    what JSON writes with a backslash.
    """
    return json.dumps(_without_lengths(json.loads(text)), ensure_ascii=False)


def _without_lengths(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for word, inner in schema.items():
        if word in ("properties", "patternProperties", "$defs", "definitions"):
            found[word] = {name: _without_lengths(value) for name, value in inner.items()}
        elif word in ("items", "additionalProperties"):
            found[word] = _without_lengths(inner)
        elif word in ("prefixItems", "anyOf", "oneOf", "allOf"):
            found[word] = [_without_lengths(value) for value in inner]
    if "minLength" in schema or "maxLength" in schema:
        least, most = found.pop("minLength", 0), found.pop("maxLength", "")
        found["pattern"] = f"{_PLAIN}{{{least},{most}}}"
    return found


def _mapping(schema: Schema, name: str, place: str) -> Schema:
    value = schema.get(name, {})
    if not isinstance(value, dict):
        _refuse(f"{place}/{name}", "an object is expected")
    return value


def _types(schema: Schema) -> tuple[str, ...]:
    value = schema.get("type", ())
    return (value,) if isinstance(value, str) else tuple(value or ())


def _is(value: object, name: str) -> bool:
    return isinstance(value, _TYPES.get(name, ())) and (
        not isinstance(value, bool) or name == "boolean"
    )


def _refuse(place: str, why: str) -> NoReturn:
    raise XverseError(
        f"The JSON schema cannot be promised, at {place:.200}.",
        f"{why[:1].upper()}{why[1:].rstrip('.')}.",
        "Leave it out, or say it in keywords that are obeyed: type, enum, properties, items, ...",
    )
