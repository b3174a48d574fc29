"""Grammars that somebody might ask for to do harm: deep, wide, endless, ambiguous, malformed."""

import json

from xverse.engine.grammar import Grammar, Kind

J = json.dumps


def _tower(word: str, height: int) -> object:
    inner: object = {"type": "string"}
    for _ in range(height):
        inner = {word: [inner, {"type": "null"}]}
    return inner


def _objects(height: int) -> object:
    if height == 0:
        return {"type": "integer"}
    inner = _objects(height - 1)
    return {"type": "object", "properties": {"a": inner, "b": inner}}


def _doubling(height: int, word: str) -> object:
    rules: dict[str, object] = {
        f"a{i}": {word: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(height)
    }
    return {"$ref": "#/$defs/a0", "$defs": rules | {f"a{height}": {"type": "string"}}}


def _named(count: int, **more: object) -> object:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}} | (
        more
    )


def _mutual(count: int) -> object:
    every = [{"$ref": f"#/$defs/d{i}"} for i in range(count)]
    rules = {f"d{i}": {"type": "array", "items": {"anyOf": every}} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": rules}


SCHEMAS = [
    "[" * 60000,
    '{"a":' * 12000,
    '{"type":"array","items":' * 2000 + "{}" + "}" * 2000,
    J(_tower("anyOf", 14)),
    J(_tower("oneOf", 14)),
    J(_tower("oneOf", 200)),
    J(_tower("allOf", 3)),
    J(_objects(4)),
    J(_objects(9)),
    J(_doubling(30, "oneOf")),
    J(_doubling(200, "anyOf")),
    J({"$ref": "#"}),
    J({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    J({"$ref": "#/$defs/gone"}),
    J({"$ref": "http://example.com/schema.json"}),
    J({"$ref": "#/" + "a/" * 20000}),
    J({"anyOf": [{"$ref": "#"}] * 2000}),
    J({"type": "array", "items": {"$ref": "#"}, "minItems": 50}),
    J({"enum": [f"v{i}" for i in range(5000)]}),
    J({"enum": ["v" * 60000]}),
    J({"enum": list(range(9000))}),
    J({"enum": []}),
    J(_named(1200)),
    J(_named(1200, additionalProperties=True)),
    J(_named(1000, required=[f"p{i}" for i in range(1000)])),
    J(_named(3, minProperties=2, maxProperties=10**9)),
    J(_mutual(60)),
    J({"type": "array", "items": {}, "minItems": 100000}),
    J({"type": "array", "items": {"type": "array", "items": {}, "maxItems": 10**6}, "maxItems": 9}),
    J({"type": "string", "maxLength": 10**6}),
    J({"type": "string", "minLength": 10**9}),
    J({"type": "integer", "minimum": -(10**30), "maximum": 10**30}),
    J({"type": "integer", "multipleOf": 10**9 + 7}),
    J({"type": "number", "minimum": 1e-300, "maximum": 1e300}),
    J({"type": "string", "pattern": "(a+)+$"}),
    J({"type": "string", "pattern": "(?=x)"}),
    J({"type": "string", "pattern": "(a{1,999}){1,999}"}),
    J({"not": {}}),
    J({"type": "object", "dependentSchemas": {"a": {}}}),
    J({"properties": {"\x00": {}}}),
    '{"type": "string"',
    '{"type": "string", "type": "null"}',
    '{"type": NaN}',
    "true",
    "null",
    "\x01\x02\x7f\x80\xff",
]
REGEXES = [
    "(a+)+$",
    "(a|a)*b",
    "(a|aa)+$",
    "(.*)*x",
    "([a-zA-Z]+)*[0-9]",
    "(x+x+)+y",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(a?){50}a{50}",
    ".*.*.*.*.*.*.*.*.*.*=.*",
    "(([a-z]*)*)*",
    "a{1,100000}",
    "(a{1,1000}){1,1000}",
    "((a{1,100}){1,100}){1,100}",
    "(a{1,16}){1,16}(a{1,16}){1,16}",
    "(.{0,60}){0,60}",
    "[^\\x00-\\x7f]{1,4000}",
    "(?=a)b",
    "(?<!a)b",
    "(a)\\1",
    "(?P<n>a)(?P=n)",
    "(?i)abc",
    "\\bword\\b",
    "a*+",
    "\\p{L}+",
    "a$b",
    "(" * 5000 + "a" + ")" * 5000,
    "((((" * 7 + "a*" + ")*)*)*)*" * 7,
    "(" * 60000,
    ")" * 60000,
    "[" * 60000,
    "\\" * 59999,
    "a" * 60000,
    "a?" * 30000,
    "(a|" * 30 + "b" + ")" * 30,
    "|".join(f"w{i}" for i in range(9000)),
    "[z-a]",
    "a{5,2}",
    "{,}",
    "\ud800",
    "a\0b",
]
RULES = [
    'root ::= root "a" | "a"',
    "root ::= root",
    "root ::= a\na ::= b\nb ::= a",
    'root ::= root root | "a" | ""',
    'root ::= root root root | [a-z] | ""',
    'root ::= e\ne ::= e e e | e e | [^x] | ""',
    "root ::= nothing",
    'first ::= "a"',
    'root ::= "a',
    "root ::= " + "(" * 30000,
    "root ::= " + "(" * 900 + '"a"' + ")*" * 900,
    'root ::= "a"{1,1000000}',
    'root ::= ("a"{1,300}){1,300}',
    "root ::= " + " ".join(["[a-z]*"] * 2000),
    "root ::= " + "|".join(['[a-z]* "x" [a-z]*'] * 2000),
    "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(500)) + '\nr500 ::= "a"\nroot ::= r0',
    "\n".join(f"r{i} ::= r{i + 1} | r{i + 1} r{i + 1}" for i in range(60))
    + ('\nr60 ::= "a"\nroot ::= r0'),
    "root ::= " + "|".join(f'"{i}"' for i in range(7000)),
    "root ::= [^\\x00-\\U0010ffff]",
    "\x01\x02\xff\xfe binary \x80",
    "root ::= " + "'" * 10000,
    "#" * 60000,
]


def grammars() -> list[tuple[Kind, str]]:
    """Kind and text of each, more than a hundred."""
    found: list[tuple[Kind, str]] = [("json_schema", text) for text in SCHEMAS]
    found += [("regex", text) for text in REGEXES]
    return found + [("ebnf", text) for text in RULES]


def worst() -> list[Grammar]:
    """Some that take longer to compile than anybody would wait, with any vocabulary."""
    return [
        Grammar.json_schema(J({"anyOf": [{"$ref": "#"}] * 2000})),
        Grammar.json_schema(J(_named(1200, additionalProperties=True))),
        Grammar.ebnf("root ::= " + "(" * 900 + '"a"' + ")*" * 900),
    ]
