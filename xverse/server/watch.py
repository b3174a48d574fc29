"""TOKENS -> NUMBERS. How long a request waited, how fast its tokens came, and how many."""

import time

from xverse.server.metrics import Metrics


class Watch:
    """Times and counts one request."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self.prompt_tokens, self.answer_tokens = prompt_tokens, 0
        self._metrics = metrics
        self._arrived = self._last = time.monotonic()
        self._first_s: float | None = None
        self._waited_s = 0.0

    def begin(self, waited_s: float) -> None:
        """It goes to the engine now."""
        self._waited_s = waited_s
        self._metrics.queued.observe(waited_s)
        self._metrics.prompt_tokens.inc(self.prompt_tokens)
        self._metrics.queries.inc(self.prompt_tokens)
        self._metrics.prompt_size.observe(self.prompt_tokens)

    def tokens(self, count: int) -> None:
        """So many tokens came now."""
        if not count:
            return
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now - self._arrived
            self._metrics.first_token.observe(self._first_s)
        else:
            self._metrics.gap.observe(now - self._last)
        self._last = now
        self.answer_tokens += count
        self._metrics.generated.inc(count)

    def end(self, facts: dict[str, object]) -> None:
        """Nothing more comes; `facts` get the numbers."""
        self._metrics.whole.observe(time.monotonic() - self._arrived)
        self._metrics.answer_size.observe(self.answer_tokens)
        facts["prompt_tokens"] = self.prompt_tokens
        facts["completion_tokens"] = self.answer_tokens
        facts["queue_ms"] = round(self._waited_s * 1000, 1)
        if self._first_s is not None:
            facts["first_token_ms"] = round(self._first_s * 1000, 1)
