"""TOKEN -> BYTES. How a vocabulary spells bytes: ByteLevel's alphabet, or SentencePiece's marks."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers

from xverse.errors import XverseError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_LEVEL = _byte_level_alphabet()


@dataclass(frozen=True)
class Spelling:
    """What a tokenizer's decoder says about the bytes of one token."""

    byte_level: bool = False
    byte_fallback: bool = False  # "<0x0A>" is the byte 10
    space_mark: str = ""  # the character that stands for a space
    strips_leading_space: bool = False

    def bytes_of(self, token: str, *, added: bool) -> bytes:
        """The bytes of `token`; `added` tokens of a ByteLevel vocabulary are spelled plainly."""
        if self.byte_level:
            codes = [BYTE_LEVEL.get(character) for character in token]
            plain = added or None in codes
            return token.encode() if plain else bytes(code for code in codes if code is not None)
        byte = BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace(self.space_mark, " ").encode()


def read_spelling(backend: tokenizers.Tokenizer) -> Spelling:
    """The spelling that the backend's decoder describes; XverseError for kinds we don't know."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps = _flatten(state)
    kinds = {str(step.get("type")) for step in steps}
    if kinds == {"ByteLevel"}:
        return Spelling(byte_level=True)
    unknown = kinds - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    marks = [_space_mark(step) for step in steps if step["type"] in {"Metaspace", "Replace"}]
    if unknown or len(set(marks)) != 1 or not marks[0]:
        raise XverseError(
            f"The tokenizer's decoder is of a kind we can't follow: {', '.join(sorted(kinds))}.",
            "We decode ByteLevel, and Metaspace or Replace with ByteFallback, Fuse, Strip.",
            "Use a model with a byte-level or SentencePiece-style BPE tokenizer.",
        )
    prefixed = [step for step in steps if step["type"] == "Metaspace"]
    strips = [step for step in steps if step["type"] == "Strip"]
    return Spelling(
        byte_fallback="ByteFallback" in kinds,
        space_mark=marks[0],
        strips_leading_space=any(step.get("prepend_scheme") != "never" for step in prefixed)
        or any(step.get("content") == " " and step.get("start") for step in strips),
    )


def _flatten(step: Mapping[str, object]) -> list[Mapping[str, object]]:
    members = step.get("decoders")
    if step.get("type") != "Sequence" or not isinstance(members, list):
        return [step]
    return [inner for member in members for inner in _flatten(member)]


def _space_mark(step: Mapping[str, object]) -> str:
    """The character that this step turns into a space; "" if that isn't what it does."""
    if step["type"] == "Metaspace":
        return str(step.get("replacement"))
    pattern = step.get("pattern")
    mark = pattern.get("String") if isinstance(pattern, Mapping) else None
    return mark if isinstance(mark, str) and step.get("content") == " " else ""
