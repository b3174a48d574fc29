"""IDS -> TEXT, ONE AT A TIME. Never half a character, never a stop string or the start of one."""

import codecs
from collections.abc import Sequence

from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer


class TextStream:
    """Decodes ids as they come. What `push` and `finish` return joins to the whole decoded text,
    cut before the stop string that begins first."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special: bool = True
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise XverseError(
                f"These are no stop strings: {stop!r:.80}.",
                "Stop strings are given as a sequence of texts that are not empty.",
                'Write for example ["\\n\\n"].',
            )
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_leading_space
        self._held = ""  # text that may turn out to begin a stop string
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared; nothing more comes then."""
        return self._stopped

    def begin(self, ids: Sequence[int]) -> str:
        """Text of ids before the first `push`, which stop strings do not end: a prompt's. Half a
        character at their end comes with what completes it."""
        data = b"".join([self._tokenizer.token_bytes(id) for id in ids if id not in self._skipped])
        return self._without_start(self._decoder.decode(data))

    def push(self, id: int) -> str:
        """Add one id; returns the text that is final now. XverseError for an unknown id."""
        if id in self._skipped:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(id)), final=False)

    def finish(self) -> str:
        """No more ids come; returns the text held back."""
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self._stopped:
            return ""
        text = self._held + self._without_start(text)
        found = min((at for s in self._stop if (at := text.find(s)) >= 0), default=len(text))
        # A longer stop string that began before `found` may still be completed: then we wait.
        open_from = len(text) if final else self._open_from(text)
        self._stopped = found < len(text) and found <= open_from
        cut = min(found, open_from)
        self._held = "" if self._stopped else text[cut:]
        return text[:cut]

    def _without_start(self, text: str) -> str:
        """The text without the space that the tokenizer puts before everything."""
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text

    def _open_from(self, text: str) -> int:
        """Where the longest tail of `text` that begins a stop string starts; its length if none."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(s.startswith(text[start:]) and len(s) > len(text) - start for s in self._stop):
                return start
        return len(text)
