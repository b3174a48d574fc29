"""LOG-PROBABILITIES -> JSON. In the forms of chat and of completions."""

from collections.abc import Sequence
from typing import Any

from xverse.engine.request import Logprob

LEAST = -9999.0  # in the place of minus infinity, which JSON does not have


def token_text(data: bytes) -> str:
    """A token as text; one that is only a part of a character as `bytes:\\xe4\\xbd`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def number(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST)


def chat_logprobs(found: Sequence[Logprob], top: int) -> list[dict[str, Any]]:
    """`content` of a chat choice's logprobs, each with its `top` best ones."""
    return [
        {**_entry(each), "top_logprobs": [_entry(best) for best in each.top[:top]]}
        for each in found
    ]


def _entry(logprob: Logprob) -> dict[str, Any]:
    return {
        "token": token_text(logprob.bytes),
        "logprob": number(logprob.logprob),
        "bytes": list(logprob.bytes),
    }


class Spoken:
    """Which log-probabilities belong to the text that was given out, and not to the end token or
    to a stop string."""

    def __init__(self, special_ids: frozenset[int], strips_leading_space: bool) -> None:
        self._special = special_ids
        self._strips = strips_leading_space
        self._text = self._told = 0  # bytes given out as text, and told of as tokens

    def take(self, text: str, found: Sequence[Logprob], *, last: bool) -> list[Logprob]:
        """Those of a piece, in order; of its last tokens only as many as its text came from."""
        self._text += len(text.encode())
        if self._strips and found and not self._told and found[0].bytes.startswith(b" "):
            self._text += 1  # the space that the text is without
        self._strips = self._strips and not found
        kept: list[Logprob] = []
        for each in found:
            if each.id in self._special:
                continue
            if last and self._told >= self._text:
                break
            self._told += len(each.bytes)
            kept.append(each)
        return kept


def completion_logprobs(
    found: Sequence[Logprob], top: int, offset: int, *, first: str | None = None
) -> dict[str, Any]:
    """The older form: four lists of one length. `offset` is the place of the first token in the
    text; `first` is the text of a prompt's first token, which nothing foretells."""
    tokens = [] if first is None else [first]
    numbers: list[float | None] = [] if first is None else [None]
    tops: list[dict[str, float] | None] = [] if first is None else [None]
    for each in found:
        tokens.append(token_text(each.bytes))
        numbers.append(number(each.logprob))
        best = {token_text(other.bytes): number(other.logprob) for other in each.top[:top]}
        tops.append({token_text(each.bytes): number(each.logprob), **best})
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += 0 if token.startswith("bytes:") else len(token)
    return {
        "tokens": tokens,
        "token_logprobs": numbers,
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }
