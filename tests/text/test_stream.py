"""Streams of text: whole characters, whole stop strings, and the same text as at once."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import shared_data
from tests.text.languages import HARD, SENTENCES
from tests.text.test_spelling import byte_level, sentencepiece
from xverse.errors import XverseError
from xverse.text.stream import TextStream
from xverse.text.tokenizer import Tokenizer


def cut(text: str, stop: list[str]) -> str:
    found = [text.find(s) for s in stop if s in text]
    return text[: min(found)] if found else text


def check(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> None:
    """Each prefix streams to what decoding it at once gives, and nothing given out is recalled."""
    for end in range(len(ids) + 1):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.push(id) for id in ids[:end]]
        text = "".join(pieces) + stream.finish()
        whole = tokenizer.decode(ids[:end])
        assert text == cut(whole, stop)
        assert stream.stopped == any(s in whole for s in stop)
        if stream.stopped:
            assert stream.push(100) == stream.finish() == ""


@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD.values()])
def test_every_language_at_every_split(text: str, tiny: Tokenizer) -> None:
    for tokenizer in (tiny, Tokenizer(byte_level()), Tokenizer(sentencepiece())):
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        seen = ""
        for id in ids:
            piece = stream.push(id)
            assert "\ufffd" not in piece
            seen += piece
            assert text.startswith(seen)
        assert seen + stream.finish() == text


def test_languages_with_the_real_vocabulary() -> None:
    tokenizer = Tokenizer.load(shared_data("tokenizer/tokenizer.json"))
    for text in [*SENTENCES.values(), *HARD.values()]:
        stream = TextStream(tokenizer)
        pieces = [stream.push(id) for id in tokenizer.encode(text)]
        assert "".join(pieces) + stream.finish() == text
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD.values()])
def test_a_beginning_of_any_length_joins_to_the_whole(text: str, tiny: Tokenizer) -> None:
    """Cut anywhere, also inside a character."""
    for tokenizer in (tiny, Tokenizer(byte_level()), Tokenizer(sentencepiece())):
        ids = tokenizer.encode(text)
        for end in range(len(ids) + 1):
            stream = TextStream(tokenizer)
            seen = stream.begin(ids[:end])
            assert text.startswith(seen)
            seen += "".join(stream.push(id) for id in ids[end:])
            assert seen + stream.finish() == text


def test_a_stop_string_in_the_beginning_ends_nothing(tiny: Tokenizer) -> None:
    stream = TextStream(tiny, ["cd"])
    assert stream.begin(tiny.encode("abcdc")) == "abcdc"
    assert "".join(stream.push(id) for id in tiny.encode("dcde")) == "d"
    assert stream.stopped


def test_stop_strings_are_held_back_and_cut(tiny: Tokenizer) -> None:
    check(tiny, tiny.encode("the end\n\nHuman: more"), ["\n\nHuman:", "\n\nExec:"])
    check(tiny, tiny.encode("one\n\ntwo\n\nHuman"), ["\n\nHuman:"])
    check(tiny, tiny.encode("你好吗？好。"), ["吗？", "。"])
    stream = TextStream(tiny, ["\n\n"])
    assert [stream.push(id) for id in tiny.encode("a\nb\n\nc")] == ["a", "", "\nb", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_longer_stop_string_that_began_earlier_wins(tiny: Tokenizer) -> None:
    for text in ("xabcy", "xabdy", "xab"):
        check(tiny, tiny.encode(text), ["abc", "b"])


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab\n你", max_size=24),
    stop=st.lists(st.text(alphabet="ab\n你", min_size=1, max_size=4), max_size=3),
)
def test_any_stop_strings(text: str, stop: list[str], tiny: Tokenizer) -> None:
    check(tiny, tiny.encode(text), stop)


def test_random_bytes_stream_as_they_decode(tiny: Tokenizer) -> None:
    dice = random.Random(5)
    first = tiny.vocab_size - 256
    for _ in range(300):
        ids = [
            first + dice.choice([dice.randrange(256), 0xE4, 0xBD, 0xF0, 0x9F]) for _ in range(12)
        ]
        check(tiny, ids, [])


def test_special_tokens_are_left_out_or_shown(tiny: Tokenizer) -> None:
    ids = [100, 3, 101]
    hidden, shown = TextStream(tiny), TextStream(tiny, skip_special=False)
    assert [hidden.push(id) for id in ids] == ["a", "", "b"]
    assert [shown.push(id) for id in ids] == ["a", "<|endoftext|>", "b"]


def test_a_long_stream_takes_linear_time(tiny: Tokenizer) -> None:
    stream = TextStream(tiny, ["\n\nHuman:"])
    for _ in range(20_000):
        stream.push(100)
    assert stream._held == ""


@pytest.mark.parametrize("stop", ["text", [""], [5]])
def test_bad_stop_strings_are_named(stop: list[str], tiny: Tokenizer) -> None:
    with pytest.raises(XverseError, match="stop strings"):
        TextStream(tiny, stop)


def test_unknown_ids_are_named(tiny: Tokenizer) -> None:
    with pytest.raises(XverseError):
        TextStream(tiny).push(10**6)
