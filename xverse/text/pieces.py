"""TEXT -> PIECES. Where each form of tokenizer cuts, for training; and the same cuts as JSON."""

import sys
import unicodedata
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Form = Literal["xverse", "improved"]
Codes = NDArray[np.uint32]

SPACE_MARK = "▁"  # U+2581, what Metaspace writes for a space
BOUNDARY = sys.maxunicode + 1  # stands between texts; no character has this code
# Unicode's White_Space, as the regex engine of `tokenizers` has it; the space itself is the mark.
WHITE_SPACE = (*range(9, 14), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F)
WHITE_SPACE += (0x205F, 0x3000)

LETTER, MARK, NUMBER, WHITE, SYMBOL, ALONE = range(6)

# "▁foo", "▁7", "▁(...)": a word, one digit or a run of symbols, with the one space before it; a run
# of white space but for that space.
IMPROVED_CUT = r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^\s▁\p{L}\p{M}\p{N}]+|[\s▁]+(?=▁[^\s▁])|[\s▁]+"


def encode_codes(texts: list[str]) -> Codes:
    """The code points of `texts`, spaces as U+2581, with BOUNDARY before, between and behind."""
    parts = [np.array([BOUNDARY], np.uint32)]
    for text in texts:
        parts.append(np.frombuffer(text.encode("utf-32-le", "replace"), "<u4"))
        parts.append(parts[0])
    codes = np.concatenate(parts)
    codes[codes == ord(" ")] = ord(SPACE_MARK)
    return codes


def find_starts(codes: Codes, form: Form) -> NDArray[np.bool_]:
    """Whether a piece starts at each of `codes`, as `pre_tokenizer(form)` cuts; shape (codes,)."""
    kinds = character_kinds(form)[codes]
    before = np.concatenate([[ALONE], kinds[:-1]])
    if form == "xverse":
        return (kinds == MARK) | (kinds == ALONE) | (before == ALONE)
    behind = np.concatenate([kinds[1:], [ALONE]])
    white, white_before = _is_white(kinds), _is_white(before)
    joins_next = (kinds == MARK) & ~_is_white(behind) & (behind != ALONE)
    goes_on = (kinds == before) & (kinds != NUMBER) & (kinds != ALONE)
    starts = np.where(white, ~white_before | joins_next, (before != MARK) & ~goes_on)
    return starts | (kinds == ALONE)


def pre_tokenizer(form: Form) -> dict[str, Any]:
    """The "pre_tokenizer" of tokenizer.json."""
    metaspace = {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": "never"}
    if form == "xverse":
        steps = [
            {**metaspace, "split": True},
            {"type": "Digits", "individual_digits": True},
            {"type": "Punctuation", "behavior": "Isolated"},
        ]
    else:
        cut = {"pattern": {"Regex": IMPROVED_CUT}, "behavior": "Isolated", "invert": False}
        steps = [{**metaspace, "split": False}, {"type": "Split", **cut}]
    return {"type": "Sequence", "pretokenizers": steps}


def _is_white(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (kinds == MARK) | (kinds == WHITE)


@lru_cache(maxsize=2)
def character_kinds(form: Form) -> NDArray[np.uint8]:
    """What each code point is to `form`; ALONE is always a piece of its own."""
    categories = [unicodedata.category(chr(code)) for code in range(sys.maxunicode + 1)]
    kinds = np.full(BOUNDARY + 1, LETTER, np.uint8)
    number, letter = (np.array([c[0] in set for c in categories]) for set in ("N", "LM"))
    if form == "xverse":
        # Rust's char::is_numeric, and ASCII punctuation with Unicode's: what Digits and
        # Punctuation isolate. A newline is no part of any token, as in the published vocabulary.
        punctuation = np.array([c[0] == "P" for c in categories])
        ascii_symbols = [ord(c) for c in "$+<=>^`|~"]
        kinds[:BOUNDARY][number | punctuation] = ALONE
        kinds[[*ascii_symbols, ord("\n"), BOUNDARY]] = ALONE
    else:
        kinds[:BOUNDARY][~letter] = SYMBOL
        kinds[:BOUNDARY][number] = NUMBER
        kinds[list(WHITE_SPACE)] = WHITE
        kinds[BOUNDARY] = ALONE
    kinds[ord(SPACE_MARK)] = MARK
    return kinds
