"""Words are cut where the tokenizer will cut, and counted the same in any number of chunks."""

import itertools
import json
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.languages import HARD, SENTENCES
from xverse.text import word_count
from xverse.text.pieces import Form, encode_codes, find_starts, pre_tokenizer
from xverse.text.word_count import WordCounts

FORMS: tuple[Form, ...] = ("xverse", "improved")
CODE = "def f(x):\n\n  if x>=10 and y!='a':\r\n\treturn  x ** 2   \n# 中文，注释。\u3000全角 ½ Ⅳ $5"


def backend(form: Form) -> tokenizers.pre_tokenizers.PreTokenizer:
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer(form)}
    content["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    return tokenizers.Tokenizer.from_str(json.dumps(content)).pre_tokenizer


BACKENDS = {form: backend(form) for form in FORMS}


def cut(text: str, form: Form) -> list[str]:
    codes = encode_codes([text])
    starts = find_starts(codes, form).nonzero()[0].tolist()
    edges = [*starts, len(codes)]
    pieces = [codes[a:b] for a, b in itertools.pairwise(edges)][1:-1]
    return ["".join(map(chr, piece.tolist())) for piece in pieces]


def expected(text: str, form: Form) -> list[str]:
    pieces = [piece for piece, _ in BACKENDS[form].pre_tokenize_str(text)]
    if form == "improved":
        return pieces
    # No merge has a newline, so that it makes no difference that pieces run across it.
    parts = [part for piece in pieces for part in piece.replace("\n", "\0\n\0").split("\0")]
    return [part for part in parts if part]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD.values(), CODE, "", " ", "\n", "a"])
def test_pieces_are_those_of_the_tokenizer(text: str, form: Form) -> None:
    assert cut(text.replace("\0", ""), form) == expected(text.replace("\0", ""), form)


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from(" \n\t\rab0٣½.。-$é\u0301中​\u3000▁😀\u200d"), max_size=12))
@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_any_text(form: Form, text: str) -> None:
    assert cut(text, form) == expected(text, form)


def words_of(counts: WordCounts) -> Counter[str]:
    table = counts.table()
    spelled = "".join(map(chr, table.codes.tolist()))
    found = zip(table.starts.tolist(), table.lengths.tolist(), table.counts.tolist(), strict=True)
    return Counter({spelled[start : start + length]: count for start, length, count in found})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threads", [1, 3])
def test_counts_are_exact_in_any_number_of_chunks(
    form: Form, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*SENTENCES.values(), *HARD.values(), CODE] * 3
    monkeypatch.setattr(word_count, "CHUNK_CHARACTERS", 400)
    counts = WordCounts(form)
    counts.add(texts, threads=threads)
    parts = [text[i : i + 400] for text in texts for i in range(0, len(text), 400)]
    plain = Counter(piece for part in parts for piece in cut(part, form) if 1 < len(piece) <= 256)
    assert words_of(counts) == plain
    characters = Counter("".join(texts).replace(" ", "▁"))
    assert {chr(c): int(counts.characters[c]) for c in counts.characters.nonzero()[0]} == characters


def test_words_that_came_once_are_forgotten_when_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(word_count, "CHUNK_CHARACTERS", 8)
    monkeypatch.setattr(word_count, "MAX_WORDS", 3)
    counts = WordCounts("xverse")
    counts.add([" ab ab", " cd ce", " cf cg", " ab ch", " ab ci", " ab cj", " ab ck"], threads=1)
    assert words_of(counts)["▁ab"] == 6
    assert len(words_of(counts)) <= 8
    assert "are forgotten" in caplog.text
