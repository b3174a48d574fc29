"""WHAT AN ANSWER MUST LOOK LIKE. A grammar as it is asked for, checked before it is compiled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from xverse.engine.grammar_regex import check_regex
from xverse.engine.grammar_schema import check_schema
from xverse.errors import XverseError

Kind = Literal["json", "json_schema", "regex", "ebnf"]
MAX_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Grammar:
    """A form that the whole answer has: any JSON object, a JSON schema, a regex, or EBNF.

    EBNF is written as `root ::= "yes" | "no"`, in the dialect of llama.cpp's GBNF and xgrammar. A
    regex matches the whole answer. XverseError for a text over 64 KiB, a regex that no automaton
    can decide (lookaround, backreferences), or a schema with a keyword that would be ignored.
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise XverseError(
                f"There are no grammars of kind {self.kind!r:.60}.",
                "An answer can be held to JSON, a JSON schema, a regex or EBNF.",
                f"Use one of: {', '.join(get_args(Kind))}.",
            )
        _check_text(self.kind, self.text)
        if self.kind == "json_schema":
            check_schema(self.text)
        elif self.kind == "regex":
            check_regex(self.text)

    @classmethod
    def json(cls) -> "Grammar":
        """Any JSON object."""
        return cls("json")

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | str) -> "Grammar":
        """JSON of a schema. Objects have the properties it names, in its order, and no others
        unless it says additionalProperties; a `pattern` matches the whole string."""
        return cls("json_schema", schema if isinstance(schema, str) else _written(schema))

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Text that the pattern matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def ebnf(cls, rules: str) -> "Grammar":
        """Text of the rule `root`."""
        return cls("ebnf", rules)


def _written(schema: Mapping[str, object]) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise XverseError(
            "The schema cannot be written as JSON.",
            str(error),
            "Build it of dicts, lists, strings, finite numbers, booleans and None.",
        ) from error


def _check_text(kind: str, text: object) -> None:
    why = None
    if not isinstance(text, str):
        why = f"It is {type(text).__name__}, and no text."
    elif (kind == "json") == bool(text):
        why = "The kind json takes no text." if text else "Its text is empty."
    elif "\0" in text:
        why = "It has a NUL character."
    elif len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        why = f"It is over {MAX_BYTES // 2**10} KiB."
    elif any("\ud800" <= character <= "\udfff" for character in text):
        why = "It has half of a surrogate pair, which is no character."
    if why is not None:
        raise XverseError(f"This is no grammar of kind {kind}.", why, "Give a shorter, plain text.")
