"""TEXT -> SHINGLES. What MinHash compares: five units in a row, words or single characters."""

import re
import zlib

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5
# Scripts written without spaces, one character a unit: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = (
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)
_UNIT = re.compile(rf"{_UNSPACED}|(?:(?!{_UNSPACED})\w)+")
_ODD = 0x9E3779B97F4A7C15


def shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of all runs of SHINGLE units of `text`, each once, sorted; shape (shingles,).

    Case, white space and punctuation don't count. A text of fewer units is one shingle, and one
    without any has none.
    """
    hashes = np.array(
        [zlib.crc32(unit.encode()) for unit in _UNIT.findall(text.lower())], np.uint64
    )
    width = min(SHINGLE, len(hashes))
    if not width:
        return hashes
    count = len(hashes) - width + 1
    mixed = np.zeros(count, np.uint64)
    for place in range(width):
        mixed = (mixed ^ hashes[place : place + count]) * np.uint64(_ODD)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)
