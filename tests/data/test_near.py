"""Shingles: what differs in case, spaces and punctuation is the same; what differs else is not."""

import numpy as np
import pytest

from tests.text.languages import SENTENCES
from xverse.data.near import shingles


def likeness(a: str, b: str) -> float:
    """Jaccard's: shared shingles of all."""
    first, second = shingles(a), shingles(b)
    return len(np.intersect1d(first, second)) / max(1, len(np.union1d(first, second)))


def test_only_words_count() -> None:
    assert (
        likeness("The quick brown fox jumps over it", "the QUICK, brown fox\njumps over it!") == 1
    )
    assert likeness("The quick brown fox jumps over it", "A slow red hen sat under it") == 0


@pytest.mark.parametrize("language", ["Chinese", "Japanese", "Thai", "English", "Khmer"])
def test_a_small_change_leaves_most(language: str) -> None:
    text = " ".join(SENTENCES.values()) + SENTENCES[language] * 3
    changed = text.replace(SENTENCES[language], SENTENCES[language][:-3], 1)
    assert 0.8 < likeness(text, changed) < 1


def test_han_is_compared_by_the_character() -> None:
    text = "今天天气很好我们去公园散步吧"
    assert len(shingles(text)) == len(text) - 4
    assert likeness(text, "昨" + text[1:]) == pytest.approx(9 / 11)


def test_short_and_empty_texts() -> None:
    assert len(shingles("two words")) == 1
    assert len(shingles("...")) == len(shingles("")) == 0
    assert likeness("two words", "two words") == 1
    assert likeness("two words", "words two") == 0
