"""A vocabulary of single bytes, and random texts of a compiled grammar."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from xgrammar import CompiledGrammar, TokenizerInfo

from xverse.engine.grammar import Grammar
from xverse.engine.grammar_process import Process, Vocabulary
from xverse.engine.grammar_state import Compiled, GrammarState, Threads, unpack

LONGER = [b'": "', b'"}', b'", "', b'\\"', b"ab", "é".encode(), "北京".encode()]
TOKENS = [bytes([byte]) for byte in range(256)] + LONGER + [b""]
END = len(TOKENS) - 1


@contextmanager
def compiler(*, leading_space: bool = False) -> Iterator[Process]:
    process = Process(Vocabulary(TOKENS, [END], leading_space))
    yield process
    process.end()


def start(process: Process, grammar: Grammar, threads: Threads) -> GrammarState:
    """The beginning of an answer, through all that a grammar goes through."""
    data = process.compile(grammar, 30.0)
    info = TokenizerInfo(TOKENS, stop_token_ids=[END])
    compiled = CompiledGrammar.deserialize_json(data.decode(), info)
    return GrammarState(Compiled(compiled, len(data)), threads)


def allowed(state: GrammarState) -> list[int]:
    mask_W = torch.empty((len(TOKENS) + 31) // 32, dtype=torch.int32)
    state.fill(mask_W)
    return unpack(mask_W, len(TOKENS)).nonzero().flatten().tolist()


def walk(state: GrammarState, seed: int, most: int = 200) -> str | None:
    """A random text that is whole, as a reader decodes it; None where it grew too long."""
    chance = random.Random(seed)
    text = b""
    for count in range(most):
        ids = allowed(state)
        closing = [id for id in ids if TOKENS[id] in (b'"', b"}", b"]", b"")]
        id = chance.choice(closing if closing and count > 20 else ids)
        state.accept(id)
        if state.terminated:
            return text.decode("utf-8", "replace")
        text += TOKENS[id]
    return None
