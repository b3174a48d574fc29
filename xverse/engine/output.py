"""TOKENS -> PIECES -> ANSWER. What comes of one prompt: its text, and the log-probabilities."""

from collections.abc import Sequence

from xverse.engine.request import Answer, Finish, Logprob, Piece, Sampling, Scores, Token, Top
from xverse.text.stream import TextStream
from xverse.text.tokenizer import Tokenizer


class Output:
    """What has come of one prompt so far; `finish` tells whether that is all."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.finish: Finish | None = None
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stream = TextStream(tokenizer, sampling.stop)
        self._pieces: list[Piece] = []
        # What the next piece will have.
        self._text = self._stream.begin(prompt) if sampling.echo else ""
        self._tokens = list(prompt) if sampling.echo else []
        self._logprobs: list[Logprob] = []
        self._reused = 0

    def take(self, output: Token | Scores) -> Piece | None:
        """Add what the engine gave; returns what is final now, None where nothing is."""
        prompt_logprobs: tuple[Logprob, ...] = ()
        if isinstance(output, Scores):
            prompt_logprobs = self._of_prompt(output)
            self.finish = "length" if output.last else None
        else:
            self._add(output)
        if self.finish:
            self._text += self._stream.finish()
            # What was held back may complete a stop string only now.
            self.finish = "stop" if self._stream.stopped else self.finish
        if not (self._text or prompt_logprobs or self.finish):
            return None
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        piece = Piece(self._text, tokens, self.finish, logprobs, prompt_logprobs, self._reused)
        self._text, self._tokens, self._logprobs, self._reused = "", [], [], 0
        self._pieces.append(piece)
        return piece

    def answer(self) -> Answer:
        """All pieces in one."""
        assert self.finish is not None, "every prompt ends"
        return Answer(
            "".join(piece.text for piece in self._pieces),
            tuple(id for piece in self._pieces for id in piece.tokens),
            self.finish,
            len(self._prompt),
            logprobs=tuple(each for piece in self._pieces for each in piece.logprobs),
            prompt_logprobs=tuple(each for piece in self._pieces for each in piece.prompt_logprobs),
        )

    def _add(self, token: Token) -> None:
        self._tokens.append(token.id)
        self._reused += token.reused
        if token.logprob is not None:
            self._logprobs.append(self._logprob(token.id, token.logprob, token.top))
        self._text += self._stream.push(token.id)
        self.finish = "stop" if self._stream.stopped else token.finish

    def _of_prompt(self, scores: Scores) -> tuple[Logprob, ...]:
        tops = scores.tops or ((),) * len(scores.logprobs)
        rows = zip(self._prompt[1:], scores.logprobs, tops, strict=True)
        return tuple(self._logprob(*row) for row in rows) if scores.logprobs else ()

    def _logprob(self, id: int, logprob: float, top: Top) -> Logprob:
        bytes_of = self._tokenizer.token_bytes
        best = tuple(Logprob(id, bytes_of(id), logprob) for id, logprob in top)
        return Logprob(id, bytes_of(id), logprob, best)
