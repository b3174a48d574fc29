"""Bytes of tokens in the two kinds of vocabularies that there are."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.text.languages import HARD, SENTENCES
from xverse.errors import XverseError
from xverse.text.spelling import BYTE_LEVEL
from xverse.text.tokenizer import Tokenizer


def byte_level() -> Backend:
    backend = Backend(models.BPE(vocab=dict(BYTE_LEVEL), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece() -> Backend:
    """As Llama-2's file is: a normalizer puts a space in front, the decoder strips it."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁▁"]
    backend = Backend(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[("▁", "▁")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def test_the_byte_level_alphabet_is_a_bijection() -> None:
    assert sorted(BYTE_LEVEL.values()) == list(range(256))
    assert BYTE_LEVEL["Ġ"] == 0x20
    assert BYTE_LEVEL["Ċ"] == 0x0A


@pytest.mark.parametrize("text", [*SENTENCES.values(), *HARD.values()])
def test_byte_level_round_trip(text: str) -> None:
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text == backend.decode(ids)
    assert not tokenizer.strips_leading_space


@pytest.mark.parametrize("text", ["a b", "  a", "b  a ", "你好 a", ""])
def test_sentencepiece_loses_one_leading_space(text: str) -> None:
    backend = sentencepiece()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text)
    assert tokenizer.strips_leading_space
    assert tokenizer.decode(ids) == text == backend.decode(ids)
    assert b"".join(map(tokenizer.token_bytes, ids)) == (f" {text}".encode() if text else b"")


def test_added_tokens_are_spelled_plainly() -> None:
    backend = byte_level()
    backend.add_tokens(["Ġé x"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes(256) == "Ġé x".encode()
    assert tokenizer.decode(tokenizer.encode("a Ġé x b")) == "a Ġé x b"


def test_other_decoders_are_named() -> None:
    backend = byte_level()
    backend.decoder = decoders.CTC()
    with pytest.raises(XverseError, match="CTC"):
        Tokenizer(backend)
