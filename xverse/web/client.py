"""PAGE -> MODEL. What a page asks of a model, and the answer of one in this process."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from xverse.engine.request import Piece, Sampling

if TYPE_CHECKING:
    from xverse.engine.llm import LLM

# A page shows what came since it last did so this many seconds ago; browsers see no difference,
# and at 300 tokens/s each of them would be a message of its own.
PACE_S = 0.04


class Client(Protocol):
    """A model as the pages know it: they stream from it, and ask nothing else."""

    @property
    def title(self) -> str:
        """What the pages call the model."""

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""

    @property
    def defaults(self) -> Sampling:
        """How the model wants its tokens chosen, every option set; max_tokens may be None."""

    def of(self, key: str | None) -> "Client":
        """The same model, asked with a visitor's API key where one is needed and none given."""

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling
    ) -> Iterator[Piece]:
        """The next turn of a conversation; roles are system, user, assistant and exec. Raises
        XverseError. Dropping the iterator ends the request."""

    def stream_text(self, prompt: str, sampling: Sampling) -> Iterator[Piece]:
        """A text continued, in the same way."""


class InProcess:
    """The client of a model in this process."""

    def __init__(self, llm: "LLM", title: str | None = None) -> None:
        self.title = title or llm.title
        self.context = llm.context
        self.defaults = Sampling().over(llm.model.checkpoint.generation_config)
        self._llm = llm

    def of(self, key: str | None) -> "InProcess":
        """As `Client` says: here no key is needed."""
        return self

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling
    ) -> Iterator[Piece]:
        """As `Client` says."""
        return self._llm.chat_stream(messages, sampling)

    def stream_text(self, prompt: str, sampling: Sampling) -> Iterator[Piece]:
        """As `Client` says."""
        return self._llm.stream(prompt, sampling)


def paced(pieces: Iterator[Piece]) -> Generator[Piece, None, None]:
    """The same text in fewer pieces, none sooner than PACE_S after the one before it. `tokens` are
    left out. Closing it closes `pieces`."""
    text, shown_at = "", float("-inf")
    try:
        for piece in pieces:
            text += piece.text
            now = time.monotonic()
            if piece.finish is not None or now - shown_at >= PACE_S:
                yield Piece(text, (), piece.finish)
                text, shown_at = "", now
        if text:  # the stream ended without saying why
            yield Piece(text, ())
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
