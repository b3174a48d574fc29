"""MODELFILE'S TEMPLATE -> TEXT. As much of Go's text/template as our Modelfiles use, to prove them.

range, if, end, :=, eq, ne, and, not, len, slice, strings, fields, and the markers that trim the
text around an action. Anything else is an error: this is no Go.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "eq": lambda values: values[0] == values[1],
    "ne": lambda values: values[0] != values[1],
    "and": all,
    "not": lambda values: not values[0],
    "len": lambda values: len(values[0]),
    "slice": lambda values: values[0][values[1] :],
}
Node = tuple[str, Any]  # ("text", it), ("action", it), or ("if" | "range", (head, nodes inside))


def render_go(template: str, messages: Sequence[Mapping[str, object]]) -> str:
    """The text that `template` makes of Ollama's .Messages. ValueError for what it cannot say."""
    return _Page(messages).written(_nodes(_actions(template)))


def _actions(template: str) -> Iterator[tuple[bool, str]]:
    """(whether it is an action, its text) of every piece, spaces trimmed as the markers say."""
    pieces = re.split(r"(\{\{-?.*?-?\}\})", template, flags=re.DOTALL)
    for at in range(1, len(pieces), 2):
        if pieces[at].startswith("{{- "):
            pieces[at - 1] = pieces[at - 1].rstrip(" \t\r\n")
        if pieces[at].endswith(" -}}"):
            pieces[at + 1] = pieces[at + 1].lstrip(" \t\r\n")
    for at, piece in enumerate(pieces):
        yield bool(at % 2), piece[2:-2].strip("-").strip() if at % 2 else piece


def _nodes(actions: Iterator[tuple[bool, str]]) -> list[Node]:
    """The nodes up to the `end` of the block that `actions` stand in."""
    nodes: list[Node] = []
    for is_action, text in actions:
        if not is_action:
            nodes.append(("text", text))
        elif text == "end":
            break
        elif text.startswith(("range ", "if ")):
            word, _, head = text.partition(" ")
            nodes.append((word, (head, _nodes(actions))))
        else:
            nodes.append(("action", text))
    return nodes


class _Page:
    """What is known while a template is written out."""

    def __init__(self, messages: Sequence[Mapping[str, object]]) -> None:
        self._root = {"Messages": list(messages)}
        self._names: dict[str, Any] = {"$": self._root}

    def written(self, nodes: Sequence[Node], dot: Any = None) -> str:
        dot = self._root if dot is None else dot
        return "".join(self._node(kind, what, dot) for kind, what in nodes)

    def _node(self, kind: str, what: Any, dot: Any) -> str:
        if kind == "text":
            return str(what)
        if kind == "if":
            head, inner = what
            return self.written(inner, dot) if self._value(head, dot) else ""
        if kind == "range":
            head, inner = what
            return self._range(head, inner, dot)
        name, assigned, value = what.partition(" := ")
        if not assigned:
            return str(self._value(what, dot))
        self._names[name] = self._value(value, dot)
        return ""

    def _range(self, head: str, inner: Sequence[Node], dot: Any) -> str:
        names, _, value = head.partition(" := ")
        index, item = names.split(", ")
        out = ""
        for at, one in enumerate(self._value(value, dot)):
            self._names[index], self._names[item] = at, one
            out += self.written(inner, one)
        return out

    def _value(self, text: str, dot: Any) -> Any:
        return self._call(re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+', text), dot)

    def _call(self, words: list[str], dot: Any) -> Any:
        """What a function and its arguments give, or the one value there is; takes them off."""
        values: list[Any] = []
        function = ""
        while words:
            word = words.pop(0)
            if word == ")":
                break
            if word == "(":
                values.append(self._call(words, dot))
            elif word in FUNCTIONS and not values and not function:
                function = word
            else:
                values.append(self._atom(word, dot))
        if function:
            return FUNCTIONS[function](values)
        if len(values) != 1:
            raise ValueError(f"{len(values)} values without a function: Go takes the first for one")
        return values[0]

    def _atom(self, word: str, dot: Any) -> Any:
        if word.startswith('"'):
            return json.loads(word)
        if word.isdigit():
            return int(word)
        base, *fields = word.split(".")
        if base and base not in self._names:
            raise ValueError(f"{word!r} is not known here")
        found = self._names[base] if base else dot
        for name in fields:  # Ollama's fields are the keys of a message with a capital
            found = found[name] if name in found else found[name.lower()]
        return found
