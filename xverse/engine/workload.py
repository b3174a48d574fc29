"""NUMBERS -> REQUESTS. Prompts and lengths to measure with, the same for whoever is measured."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from xverse.engine.request import Request, Sampling

# Prompt ids go from 0 to this, where the vocabulary has as many. With seed 0 and 256 requests of
# 100 to 1024 tokens in and out, the draws are those of nano-vllm's benchmark: 142,827 tokens in,
# 133,966 out.
LARGEST_ID = 10_000

Range = tuple[int, int]


def make_requests(
    count: int,
    prompt_tokens: Range,
    new_tokens: Range,
    *,
    vocabulary: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Request]:
    """`count` requests of random ids, lengths uniform between both ends of a range, ends included.

    All lengths and ids of the prompts are drawn first, then all lengths of the answers. Answers
    have exactly their length: end ids do not end them.
    """
    random = Random(seed)
    largest = min(vocabulary - 1, LARGEST_ID)
    prompts = [
        tuple(random.randint(0, largest) for _ in range(random.randint(*prompt_tokens)))
        for _ in range(count)
    ]
    limits = [random.randint(*new_tokens) for _ in range(count)]
    return [
        Request(ids, _sampling(limit, temperature, number))
        for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def apart(requests: Sequence[Request], name: str) -> list[Request]:
    """The same requests, sharing no page of KV memory with each other or with those of another
    name: a second round of the same prompts is computed in full."""
    return [
        replace(request, namespace=f"{name} {number}") for number, request in enumerate(requests)
    ]


def _sampling(max_tokens: int, temperature: float, number: int) -> Sampling:
    seed = number if temperature else None
    return Sampling(
        max_tokens=max_tokens, temperature=temperature, ignore_eos=True, seed=seed
    ).over({})
