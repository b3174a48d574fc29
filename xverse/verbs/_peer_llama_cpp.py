"""LLAMA.CPP AS A PEER. llama-cpp-python on the GGUF file itself, one request after another."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from llama_cpp import Llama

from xverse.engine.request import Request, Token
from xverse.verbs._peers import Subject


def open_peer(subject: Subject) -> "LlamaCppPeer":
    """The file, opened anew: llama.cpp computes with its packed blocks as they are."""
    return LlamaCppPeer(subject)


class LlamaCppPeer:
    """Requests one after another, which is what the Python binding does."""

    def __init__(self, subject: Subject) -> None:
        threads = torch.get_num_threads()
        self.llama: Any = Llama(
            str(subject.path),
            n_ctx=subject.longest,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if subject.device.type == "cuda" else 0,
            verbose=False,
        )
        self.computes = "the file's own blocks, one at a time"
        self.same_weights = False  # it rounds what it multiplies them with to 8 bits
        self._next = 0
        self._queue: deque[tuple[int, Request]] = deque()
        self._tokens: Iterator[Token] = iter(())

    def add(self, request: Request) -> int:
        """Queue it."""
        self._queue.append((self._next, request))
        self._next += 1
        return self._next - 1

    def step(self) -> Sequence[Token]:
        """The next token of the request that runs."""
        token = next(self._tokens, None)
        if token is None:
            self._tokens = self._answer(*self._queue.popleft())
            token = next(self._tokens)
        return [token]

    def close(self) -> None:
        """Give its memory back."""
        self.llama.close()

    def _answer(self, number: int, request: Request) -> Iterator[Token]:
        sampling = request.sampling
        assert sampling is not None, "it decodes"
        self.llama.reset()  # or the same beginning would be taken from the last request
        ids = self.llama.generate(
            list(request.ids),
            temp=sampling.temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repeat_penalty=1.0,
        )
        for count, id in enumerate(islice(ids, sampling.max_tokens), 1):
            yield Token(number, id, "length" if count == sampling.max_tokens else None)
