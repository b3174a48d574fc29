"""Samples: text and conversations become rows of ids, none lost, and bad files are named."""

import json
from pathlib import Path

import pytest

from tests.text.tiny import write_tiny_tokenizer
from xverse.errors import XverseError
from xverse.text.chat import V2
from xverse.text.samples import read_samples
from xverse.text.tokenizer import Tokenizer

CONFIG: dict[str, object] = {"model_type": "xverse"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tiny_tokenizer(tmp_path)
    return Tokenizer.load(tmp_path)


def test_a_text_is_cut_into_rows_and_nothing_is_lost(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "The king and the queen. " * 20
    (tmp_path / "a.txt").write_text(text)
    rows = read_samples(tmp_path / "a.txt", tokenizer, CONFIG, length=16)
    assert all(len(row) == 16 for row in rows[:-1])
    whole = tokenizer.encode(text)
    ids = [id for row in rows for id in row]
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) <= 1  # one id alone predicts nothing


def test_lines_may_be_texts_or_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    lines = [{"text": "one"}, {"messages": messages}, {"conversations": shared}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (row,) = read_samples(tmp_path / "a.jsonl", tokenizer, CONFIG, length=1000)
    assert tokenizer.eos_id is not None
    chat = V2.render(messages, tokenizer).ids
    assert row == [*tokenizer.encode("one"), tokenizer.eos_id, *chat, *chat]


def test_few_of_many_are_spread_over_the_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh " * 200)
    every = read_samples(tmp_path / "a.txt", tokenizer, CONFIG, length=8)
    some = read_samples(tmp_path / "a.txt", tokenizer, CONFIG, length=8, count=4)
    assert some == [every[place * len(every) // 4] for place in range(4)]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no text"),
        (b'{"text": 5}\n', "Line 1"),
        (b'{"text": "x"}\n{"prompt": "x"}\n', "Line 2"),
        (b'{"text": "x"}\nnot json\n', "Line 2"),
        (b'{"messages": [{"role": "king", "content": "x"}]}\n', "Line 1"),
        (b'{"messages": ["x"]}\n', "Line 1"),
    ],
)
def test_bad_files_are_named(
    content: bytes, named: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(XverseError, match=named):
        read_samples(tmp_path / "a.jsonl", tokenizer, CONFIG, length=8)


def test_files_that_are_no_text_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("a.txt", "absent.txt", "."):
        with pytest.raises(XverseError, match="cannot be read"):
            read_samples(tmp_path / name, tokenizer, CONFIG, length=8)
