"""Each rule drops what it is for, and nothing of ordinary text in any language."""

import random

import pytest

from tests.text.languages import SENTENCES
from xverse.data.filters import Limits, repeated_part, why_dropped

PROSE = "\n".join(SENTENCES.values())
CODE = "".join(f"    if x[{i}] >= {i}:\n        return f(x[{i - 1}])  # {i}\n" for i in range(40))


@pytest.mark.parametrize("language", SENTENCES)
def test_no_language_is_dropped(language: str) -> None:
    sentence = SENTENCES[language]
    assert why_dropped(sentence, "web", Limits(min_characters=5)) == ""


def test_code_and_prose_stay() -> None:
    assert why_dropped(PROSE, "web", Limits()) == ""
    assert why_dropped(CODE, "code", Limits()) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("too little", "too short"),
        ("Subscribe to our newsletter!\n" * 20 + PROSE[:300], "repeated lines"),
        ("buy now " * 500, "repetition"),
        ("=-=-*&^%$#@!(){}[]<>?/|" * 4 + PROSE[:60], "symbols"),
        (PROSE[:200] + "\ufffd" * 20, "garbled"),
        (PROSE[:200] + "\x01\x02\x03", "garbled"),
    ],
)
def test_each_rule(text: str, why: str) -> None:
    assert why_dropped(text, "web", Limits()) == why


def test_limits_are_limits() -> None:
    assert why_dropped(PROSE, "web", Limits(max_characters=100)) == "too long"
    assert why_dropped("buy now " * 500, "web", Limits(max_packing=10**6)) == ""


def test_random_letters_are_no_repetition() -> None:
    chance = random.Random(1)
    text = "".join(chance.choices("abcdefghij ", k=400_000))
    assert why_dropped(text, "web", Limits()) == ""


def test_the_repeated_part() -> None:
    assert repeated_part("a\nb\nc\nd\ne") == 0
    assert repeated_part("aa\naa\naa\n\naa\nbb") == pytest.approx(0.6)
    assert repeated_part("aa\naa") == 0  # too few lines to tell
