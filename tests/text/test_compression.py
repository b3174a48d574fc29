"""Compression is counted exactly, by language; words only where there are spaces between them."""

from tests.text.languages import SENTENCES
from xverse.text.compression import measure_compression
from xverse.text.tokenizer import Tokenizer


def test_counts_of_two_languages(tiny: Tokenizer) -> None:
    english, chinese = "the cat sat on the mat", SENTENCES["Chinese"]
    found = measure_compression(tiny, [("zh", chinese), ("en", english), ("en", english)])
    assert list(found) == ["en", "zh"]
    en, zh = found["en"], found["zh"]
    assert en.tokens == 2 * len(tiny.encode(english))
    assert (en.bytes, en.characters, en.words) == (44, 44, 12)
    assert en.bytes_per_token == 44 / en.tokens
    assert en.tokens_per_word == en.tokens / 12
    assert en.byte_tokens == 0
    assert zh.characters_per_token == len(chinese) / len(tiny.encode(chinese))
    assert zh.tokens_per_word is None
    assert zh.byte_tokens > 0


def test_no_text(tiny: Tokenizer) -> None:
    assert measure_compression(tiny, []) == {}
    empty = measure_compression(tiny, [("en", "")])["en"]
    assert (empty.bytes_per_token, empty.tokens_per_word) == (0, None)
