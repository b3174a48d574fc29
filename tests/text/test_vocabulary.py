"""A trained tokenizer has the published layout, loses no text, and loads in other libraries."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import shared_data
from tests.text.languages import HARD, SENTENCES
from xverse.errors import XverseError
from xverse.text.pieces import Form
from xverse.text.tokenizer import Tokenizer
from xverse.text.vocabulary import SPECIALS, train_tokenizer

CODE = "class A:\n    def f(self, x):\n        if x >= 10:\n            return f(x - 1)\n\n\n"
TEXTS = [*SENTENCES.values()] * 3 + [*HARD.values(), *[CODE] * 20, "The dog in the house. " * 9]
FORMS: tuple[Form, ...] = ("xverse", "improved")


@pytest.fixture(scope="module")
def trained() -> dict[Form, Tokenizer]:
    return {form: train_tokenizer(TEXTS, vocab_size=1000, form=form) for form in FORMS}


def test_the_published_layout(trained: dict[Form, Tokenizer]) -> None:
    tokenizer = trained["xverse"]
    size = tokenizer.vocab_size
    tokens = [tokenizer.backend.id_to_token(id) for id in range(size)]
    assert size == 1000
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (1, 2, 3)
    assert tokens[:6] == list(SPECIALS)
    assert tokenizer.special_ids == frozenset(range(6))
    assert tokenizer.encode("!0A9a") == [36, 51, 68, 60, 100]  # as in the published file
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    first = tokens.index("".join(merges[0]))
    assert tokens[6:first] == sorted(tokens[6:first])
    assert all(len(token) == 1 for token in tokens[6:first])
    assert tokens[first:-257] == ["".join(pair) for pair in merges]  # id of merge k is first + k
    assert tokens[-257:] == ["\n", *(f"<0x{byte:02X}>" for byte in range(256))]


def test_the_published_cuts(trained: dict[Form, Tokenizer]) -> None:
    encode = trained["xverse"].encode
    newline, space = encode("\n"), encode(" ")
    assert len(newline) == len(space) == 1
    assert encode("\n\n") == newline * 2
    assert encode("    ") == space * 4
    assert encode("1953") == encode("1") + encode("9") + encode("5") + encode("3")
    assert encode("...") == encode(".") * 3
    assert encode("dog")[0] != encode(" dog")[0]  # nothing is prefixed


def test_what_the_improved_form_is_better_at(trained: dict[Form, Tokenizer]) -> None:
    published, improved = trained["xverse"], trained["improved"]
    assert len(improved.encode("\n\n\n")) == 1
    assert len(improved.encode(" " * 7)) == 1
    assert len(improved.encode(" 7")) == 2 or improved.encode(" 7") != improved.encode("7")
    assert len(improved.encode(CODE)) < 0.7 * len(published.encode(CODE))
    tokens = improved.backend.get_vocab()
    assert not any(token.startswith(("nThe", "n\\t")) or "\\n" in token for token in tokens)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@pytest.mark.parametrize("form", FORMS)
def test_no_text_is_lost(trained: dict[Form, Tokenizer], form: Form, text: str) -> None:
    tokenizer = trained[form]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_here_and_in_transformers(
    trained: dict[Form, Tokenizer], form: Form, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    trained[form].save(tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCES.values(), CODE]:
        ids = trained[form].encode(text)
        assert ours.encode(text) == theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eos_id == 3


@pytest.mark.parametrize("form", FORMS)
def test_the_same_texts_give_the_same_file(form: Form) -> None:
    def digest(threads: int) -> str:
        tokenizer = train_tokenizer(TEXTS, vocab_size=800, form=form, threads=threads)
        return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()

    assert digest(1) == digest(1) == digest(3)


def test_special_tokens_in_the_corpus_are_plain_text(trained: dict[Form, Tokenizer]) -> None:
    tokenizer = train_tokenizer(["<|endoftext|> " * 200], vocab_size=700, form="improved")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_rare_characters_are_bytes_and_a_poor_text_fills_no_vocabulary(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = train_tokenizer(["ab " * 10_000 + "龘"], vocab_size=1000)
    assert "龘" not in tokenizer.backend.get_vocab()
    assert len(tokenizer.encode("龘")) == 3
    assert tokenizer.vocab_size < 400
    assert "not 1000" in caplog.text
    assert tokenizer.decode(tokenizer.encode("龘")) == "龘"


def test_characters_take_at_most_half_of_the_ids() -> None:
    tokenizer = train_tokenizer(["".join(map(chr, range(0x4E00, 0x6000)))], vocab_size=1000)
    assert sum(len(token) == 1 for token in tokenizer.backend.get_vocab()) <= 500


@pytest.mark.parametrize("vocab_size", [0, 263, 500])
def test_a_vocabulary_that_is_too_small_is_refused(vocab_size: int) -> None:
    with pytest.raises(XverseError, match="too small"):
        train_tokenizer(["abc"], vocab_size=vocab_size)


def test_encode_many_is_encode(trained: dict[Form, Tokenizer]) -> None:
    texts = ["", "a <|endoftext|> b", *SENTENCES.values()]
    tokenizer = trained["xverse"]
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    with pytest.raises(XverseError):
        tokenizer.encode_many(["ok", "\ud800"])


def test_layout_on_the_shared_corpus_is_that_of_the_published_file() -> None:
    """Specials and ASCII have the very ids of the published tokenizer."""
    published = Tokenizer.load(shared_data("tokenizer/tokenizer.json"))
    lines = shared_data("corpus/zh-laws.jsonl").read_text("utf-8").splitlines()[:40]
    tokenizer = train_tokenizer((json.loads(line)["text"] for line in lines), vocab_size=4000)
    shared = [published.backend.id_to_token(id) for id in range(130)]
    ours = [tokenizer.backend.id_to_token(id) for id in range(130)]
    assert ours[: shared.index("~") + 2] == shared[: shared.index("~") + 2]
