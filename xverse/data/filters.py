"""TEXT -> KEEP OR WHY NOT. Rules that hold in every language: length, repetition, symbols."""

import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from xverse.text.pieces import LETTER, NUMBER, SYMBOL, character_kinds

SAMPLE = 1 << 18  # characters that are looked at; a book shows what it is in its first pages
FEW_LINES = 5


@dataclass(frozen=True)
class Limits:
    """What a document must keep to; the defaults drop no page of a clean novel."""

    min_characters: int = 50
    max_characters: int = 0
    """0: no limit."""
    max_repeated: float = 0.3
    """Part of the text in lines that came before (0.2 in Gopher, Rae et al. 2021)."""
    max_packing: float = 15.0
    """How many times smaller zlib may make it: novels and code 2-3, laws up to 7."""
    min_letters: float = 0.5
    """Letters, marks and digits among what is no white space; half of that in code."""
    max_garbled: float = 0.001
    """U+FFFD and control characters."""


def why_dropped(text: str, kind: str, limits: Limits) -> str:
    """The rule that `text` breaks, or "" where it may stay."""
    length = len(text)
    if length < limits.min_characters:
        return "too short"
    if limits.max_characters and length > limits.max_characters:
        return "too long"
    sample = text[:SAMPLE]
    if repeated_part(sample) > limits.max_repeated:
        return "repeated lines"
    raw = sample.encode()
    if len(raw) / len(zlib.compress(raw, 1)) > limits.max_packing:
        return "repetition"
    codes = np.frombuffer(sample.encode("utf-32-le"), "<u4")
    kinds = np.bincount(character_kinds("improved")[codes], minlength=SYMBOL + 1)
    spelled = kinds[LETTER] + kinds[NUMBER]
    least = limits.min_letters / 2 if kind == "code" else limits.min_letters
    if spelled < least * (spelled + kinds[SYMBOL]):
        return "symbols"
    control = (codes < 32) & ~np.isin(codes, (9, 10, 12, 13))
    if control.sum() + (codes == 0xFFFD).sum() > limits.max_garbled * len(codes):
        return "garbled"
    return ""


def repeated_part(text: str) -> float:
    """Part of `text`, by characters, in lines that came before in it."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) < FEW_LINES:
        return 0.0
    again = sum((count - 1) * len(line) for line, count in Counter(lines).items())
    return again / sum(map(len, lines))
