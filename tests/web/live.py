"""FIXTURE. A model that answers with what it was asked, word by word, and the pages of it."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from xverse.engine.request import Piece, Sampling
from xverse.errors import XverseError
from xverse.web.site import Lang, Page, listen, server

WORDS, PACE_S = 1500, 0.04  # of an answer that outlasts every test; none waits for its end


class Echo:
    """Answers "[system:...][user:...]", all messages it was given. A message that has the word
    `slowly` is answered in WORDS words, one each PACE_S; one that has `refused` is not answered."""

    title = "Echo-7B-Chat"
    context = 4096
    defaults = Sampling(max_tokens=512, temperature=0.5, top_k=30, top_p=0.85).over({})

    def __init__(self) -> None:
        self.asked: list[Sequence[Mapping[str, str]] | str] = []
        self.samplings: list[Sampling] = []
        self.open = 0
        self.keys: list[str | None] = []

    def of(self, key: str | None) -> "Echo":
        self.keys.append(key)
        return self

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling
    ) -> Iterator[Piece]:
        self.asked.append(messages)
        said = "".join(f"[{each['role']}:{each['content'][:40]}]" for each in messages)
        return self._stream(said, messages[-1]["content"], sampling)

    def stream_text(self, prompt: str, sampling: Sampling) -> Iterator[Piece]:
        self.asked.append(prompt)
        return self._stream(f"<{prompt}>", prompt, sampling)

    def _stream(self, text: str, last: str, sampling: Sampling) -> Iterator[Piece]:
        self.samplings.append(sampling)
        self.open += 1
        try:
            if "refused" in last:
                raise XverseError("Refused.", "It said <so>.", "Say less.")
            yield Piece(text, (1,))
            for number in range(WORDS if "slowly" in last else 2):
                time.sleep(PACE_S if "slowly" in last else 0)
                yield Piece(f" w{number}", (2,))
            yield Piece("", (), "length" if "cut" in last else "stop")
        finally:
            self.open -= 1


@contextmanager
def pages(
    client: Echo, *, page: Page = "both", lang: Lang = "auto", auth: tuple[str, str] | None = None
) -> Iterator[str]:
    """The pages of a client, served from a thread; gives their address."""
    with listen("127.0.0.1", 0) as at:
        running = server(client, at, page=page, lang=lang, auth=auth)
        running.config.timeout_graceful_shutdown = 1
        thread = threading.Thread(target=running.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not running.started:
            assert time.monotonic() < end, "the pages did not start"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        running.should_exit = True
        thread.join(20)


def eventually(true: "object", seconds: float = 10) -> None:
    """Wait until a function of no arguments says yes."""
    assert callable(true)
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)
