"""REGEX -> YES OR NO. Whether a regex is of the kind that is matched in linear time."""

import re

from xverse.errors import XverseError

MAX_DEPTH = 32
MAX_COUNT = 4096  # of {m,n}, multiplied where they are nested
_BRACES = re.compile(r"\{(\d{1,9})(,(\d{0,9}))?\}")
_GROUPS = {
    "?=": "lookahead",
    "?!": "lookahead",
    "?<=": "lookbehind",
    "?<!": "lookbehind",
    "?>": "an atomic group",
    "?P=": "a backreference",
    "?(": "a conditional group",
    "?#": "a comment",
}
_ESCAPES = {
    "b": "a word boundary",
    "B": "a word boundary",
    "A": "an anchor inside",
    "Z": "an anchor inside",
    "z": "an anchor inside",
    "G": "an anchor inside",
    "k": "a backreference",
    "p": "a Unicode class",
    "P": "a Unicode class",
} | dict.fromkeys("123456789", "a backreference")


def check_regex(pattern: str) -> None:
    """XverseError, by the construct's name, where a finite automaton cannot do as it says.

    What is merely misspelt is left to the compiler to find.
    """
    _Scan(pattern).run()


class _Scan:
    """One pass from left to right; `counts` has for each open group how often its worst part is
    repeated by counts within."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.counts = [1]
        self.latest = 1  # of the item just read: what a {m,n} after it would multiply
        self.anchored = self.alternatives = False

    def run(self) -> None:
        while self.at < len(self.pattern):
            self._item(self.pattern[self.at])
        if self.anchored and self.alternatives:
            self._refuse("an anchor in one of several alternatives")

    def _item(self, character: str) -> None:
        if character == "\\":
            self._escape()
        elif character == "[":
            self._skip_class()
        elif character == "(":
            self._open()
        elif character == ")":
            self._close()
        elif character in "^$":
            self._anchor(character)
        elif character == "{" and (found := _BRACES.match(self.pattern, self.at)):
            self._count(found)
        else:
            self.at += 1
            if character == "|":
                self.alternatives |= len(self.counts) == 1
            elif character in "*+?":
                self._after_quantifier()
            else:
                self.latest = 1

    def _escape(self) -> None:
        kind = _ESCAPES.get(self.pattern[self.at + 1 : self.at + 2])
        if kind is not None:
            self._refuse(kind)
        self.at += 2
        self.latest = 1

    def _skip_class(self) -> None:
        self.at += 1
        if self.pattern[self.at : self.at + 1] == "^":
            self.at += 1
        if self.pattern[self.at : self.at + 1] == "]":
            self._refuse("a class that begins with an unescaped ]")
        while self.at < len(self.pattern) and self.pattern[self.at] != "]":
            if self.pattern[self.at] == "\\" and self.pattern[self.at + 1 : self.at + 2] in "pP":
                self._refuse("a Unicode class")
            self.at += 2 if self.pattern[self.at] == "\\" else 1
        self.at += 1
        self.latest = 1

    def _open(self) -> None:
        rest = self.pattern[self.at + 1 : self.at + 4]
        for start, kind in _GROUPS.items():
            if rest.startswith(start):
                self._refuse(kind)
        if rest.startswith("?") and not rest.startswith("?:"):
            self._refuse("a named group or a flag")
        self.at += 3 if rest.startswith("?:") else 1
        self.counts.append(1)
        self.latest = 1
        if len(self.counts) > MAX_DEPTH + 1:
            self._refuse(f"groups nested deeper than {MAX_DEPTH}")

    def _close(self) -> None:
        self.at += 1
        if len(self.counts) > 1:  # else it has too many, which the compiler says
            self.latest = self.counts.pop()
            self.counts[-1] = max(self.counts[-1], self.latest)

    def _anchor(self, character: str) -> None:
        """The whole answer is matched anyway; anchors elsewhere would be ignored."""
        place = 0 if character == "^" else len(self.pattern) - 1
        if self.at != place:
            self._refuse("an anchor inside")
        self.at += 1
        self.anchored = True

    def _count(self, found: re.Match[str]) -> None:
        self.at = found.end()
        self.latest *= max(int(found[3] or found[1]), 1)
        if self.latest > MAX_COUNT:
            self._refuse(f"more than {MAX_COUNT} counted repetitions")
        self.counts[-1] = max(self.counts[-1], self.latest)
        self._after_quantifier()

    def _after_quantifier(self) -> None:
        """Lazy ones match the same whole texts; possessive ones do not."""
        if self.pattern[self.at : self.at + 1] == "?":
            self.at += 1
        elif self.pattern[self.at : self.at + 1] == "+":
            self._refuse("a possessive or doubled quantifier")

    def _refuse(self, construct: str) -> None:
        raise XverseError(
            f"The regex has {construct}, at character {self.at}.",
            "Answers are held to what an automaton matches in linear time, as a whole.",
            "Write it with classes, groups, |, ?, *, + and small {m,n}; or ask for ebnf.",
        )
