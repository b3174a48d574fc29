"""Which language a browser gets, and that every language is whole."""

import dataclasses

import pytest

from xverse.web.words import EN, JA, LANGUAGES, ZH, negotiate


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-TW", "zh"),
        ("ja", "ja"),
        ("de-DE,de;q=0.9,ja;q=0.5,en;q=0.4", "ja"),
        ("fr", "en"),
        ("en;q=0.2, JA;q=0.9", "ja"),
        ("zh;q=0, en;q=0.1", "en"),
        ("zh;q=nan, ja;q=7, en;q=x", "en"),
        ("*", "en"),
        (",;,;;q=", "en"),
        ("zh," * 100_000, "zh"),
    ],
)
def test_negotiation(header: str, language: str) -> None:
    assert negotiate(header) == language


@pytest.mark.parametrize("words", LANGUAGES.values())
def test_every_word_is_there(words: object) -> None:
    for name, value in dataclasses.asdict(words).items():  # type: ignore[call-overload]
        assert value, name
        assert all(value), name
    assert isinstance(words, type(EN))
    assert len(words.examples) == len(EN.examples)
    assert len(words.prompts) == len(EN.prompts)


def test_sentences_are_translated() -> None:
    for name in ("message", "send", "reset", "advanced", "hint", "system_info", "likelier"):
        assert len({getattr(words, name) for words in (ZH, EN, JA)}) == 3, name
