"""TOKENIZER, TEXTS -> HOW SHORT. Bytes and characters a token, tokens a word, by language."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from xverse.text.tokenizer import Tokenizer

BATCH = 256
_WORD = re.compile(r"\w+")
# A language that writes spaces has one in every ten characters at least, code included; what has
# fewer has no words that could be counted by looking.
LEAST_SPACES = 0.05


@dataclass
class Compression:
    """What texts of one language came to."""

    bytes: int = 0
    characters: int = 0
    spaces: int = 0
    words: int = 0
    tokens: int = 0
    byte_tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token: what two tokenizers are compared by."""
        return self.bytes / max(1, self.tokens)

    @property
    def characters_per_token(self) -> float:
        """Characters a token."""
        return self.characters / max(1, self.tokens)

    @property
    def tokens_per_word(self) -> float | None:
        """Tokens a word; None in languages that are written without spaces."""
        if not self.words or self.spaces < LEAST_SPACES * self.characters:
            return None
        return self.tokens / self.words


def measure_compression(
    tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]
) -> dict[str, Compression]:
    """Of every language in (language, text), in alphabetical order, what its texts came to."""
    byte_ids = {tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
    found: dict[str, Compression] = {}
    waiting = iter(texts)
    while batch := list(islice(waiting, BATCH)):
        encoded = tokenizer.encode_many([text for _, text in batch])
        for (language, text), ids in zip(batch, encoded, strict=True):
            sums = found.setdefault(language, Compression())
            sums.bytes += len(text.encode())
            sums.characters += len(text)
            sums.spaces += text.count(" ")
            sums.words += sum(1 for _ in _WORD.finditer(text))
            sums.tokens += len(ids)
            sums.byte_tokens += sum(id in byte_ids for id in ids)
    return dict(sorted(found.items()))
