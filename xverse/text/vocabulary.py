"""TEXTS -> TOKENIZER. Trains one in XVERSE's published form, or in the improved one."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import tokenizers
from numpy.typing import NDArray

from xverse.errors import XverseError
from xverse.log import counter, logger
from xverse.text.bpe import WALL, learn_merges
from xverse.text.pieces import SPACE_MARK, Form, pre_tokenizer
from xverse.text.tokenizer import XVERSE_SPECIALS, Tokenizer
from xverse.text.word_count import WordCounts

# Ids 0-5 of every XVERSE tokenizer.
SPECIALS = (
    "<sep>",
    "<pad>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|endofknowledge|>",
)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Always in the vocabulary, so that ASCII has the published ids: "!" 36, "0" 51, "A" 68, "a" 100.
ASCII = tuple(chr(code) for code in range(128) if chr(code) not in "\n\r ")
# Beyond this part of all characters, a character is spelled in bytes; SentencePiece's own figure.
COVERAGE = 0.9995


@dataclass(frozen=True)
class Layout:
    """The ids of a tokenizer: specials, single characters by code point, merges, tail, in a row."""

    characters: tuple[str, ...]
    tail: tuple[str, ...]  # "\n" in XVERSE's form, then the 256 bytes

    def room(self, vocab_size: int) -> int:
        """Merges that there are ids for."""
        return vocab_size - len(SPECIALS) - len(self.characters) - len(self.tail)

    def vocabulary(self, merges: list[tuple[str, str]]) -> dict[str, int]:
        """Token -> id."""
        merged = [left + right for left, right in merges]
        tokens = [*SPECIALS, *self.characters, *merged, *self.tail]
        vocabulary = {token: id for id, token in enumerate(tokens)}
        assert len(vocabulary) == len(tokens), "a token has two ids"
        return vocabulary


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    form: Form = "xverse",
    coverage: float = COVERAGE,
    threads: int = 1,
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids, learnt from `texts` in one pass over them.

    "xverse" is the published form: digits and punctuation one by one, no prefixed space, newlines
    never merged. "improved" has tokens for runs of spaces, newlines and symbols, and for a digit
    with the space before it. The same texts in the same order give the same tokenizer, whatever
    `threads` is. Raises XverseError where `vocab_size` has no room for bytes and ASCII.
    """
    counts = WordCounts(form)
    counts.add(texts, threads=threads)
    layout = choose_layout(counts.characters, vocab_size, form, coverage)
    symbol_of = np.full(len(counts.characters), WALL, np.int32)
    symbol_of[[ord(character) for character in layout.characters]] = range(len(layout.characters))
    wanted = layout.room(vocab_size)
    with counter(wanted, "merges") as one_more:
        merges = learn_merges(
            counts.table(), symbol_of, list(layout.characters), wanted, on_merge=one_more
        )
    if len(merges) < wanted:
        size = vocab_size - wanted + len(merges)
        logger.warning("the vocabulary has %d ids, not %d: nothing more repeats", size, vocab_size)
    return build_tokenizer(layout, merges, form)


def choose_layout(
    counts: NDArray[np.int64], vocab_size: int, form: Form, coverage: float
) -> Layout:
    """The single characters that get an id: the most frequent, up to `coverage` of all text.

    At most half of the ids are spent on them. `counts` is by code point.
    """
    own_newline = form == "xverse"
    always = {*ASCII, SPACE_MARK, *([] if own_newline else "\n\r")}
    tail = ("\n", *BYTE_TOKENS) if own_newline else BYTE_TOKENS
    room = (vocab_size - len(SPECIALS) - len(tail)) // 2
    if room < len(always):
        least = len(SPECIALS) + len(tail) + 2 * len(always)
        raise XverseError(
            f"A vocabulary of {vocab_size} ids is too small.",
            f"Specials, bytes and ASCII take half of {least}.",
            f"Ask for {least} or more; 32,000 is usual for a small model.",
        )
    ranked = np.lexsort((np.arange(len(counts)), -counts))
    shares = np.cumsum(counts[ranked]) / max(1, int(counts.sum()))
    needed = int(np.searchsorted(shares, coverage)) + 1
    chosen = set(always)
    for code in ranked[: min(needed, int((counts > 0).sum()))].tolist():
        if len(chosen) == room:
            break
        if chr(code) != "\n" or not own_newline:
            chosen.add(chr(code))
    return Layout(tuple(sorted(chosen)), tail)


def build_tokenizer(layout: Layout, merges: list[tuple[str, str]], form: Form) -> Tokenizer:
    """The tokenizer that has these ids and merges."""
    metaspace = {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": "never"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": True}
            for id, token in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer(form),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [{**metaspace, "split": form == "xverse"}, {"type": "ByteFallback"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "vocab": layout.vocabulary(merges),
            "merges": [list(pair) for pair in merges],
        },
    }
    return Tokenizer(
        tokenizers.Tokenizer.from_str(json.dumps(content)),
        bos_token=XVERSE_SPECIALS["bos"],
        eos_token=XVERSE_SPECIALS["eos"],
        pad_token=XVERSE_SPECIALS["pad"],
        config={"xverse_form": form},
    )
