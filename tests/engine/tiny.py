"""A decoder small enough for hundreds of steps, and what the plain decoder says."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import torch

from xverse.engine.request import Sampling
from xverse.engine.simple import decode
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape

VOCAB = 60
CONFIG: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@cache
def tiny_decoder() -> Decoder:
    """Random weights, large enough that answers vary; fp32."""
    return _random(CONFIG)


@cache
def dynamic_decoder() -> Decoder:
    """Trained on 16 tokens, stretched to 64 by rope that follows the length of a sequence."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    return _random(CONFIG | {"max_position_embeddings": 16, "rope_scaling": scaling})


@cache
def repeating_decoder(dtype: torch.dtype = torch.float32, *, dynamic: bool = False) -> Decoder:
    """Attention whispers only, so that answers run in circles: there is something to guess."""
    decoder = deepcopy(dynamic_decoder() if dynamic else tiny_decoder())
    for block in decoder.model.layers:
        block.self_attn.o_proj.weight.mul_(0.01)
    return decoder.to(dtype)


def _random(config: dict[str, object]) -> Decoder:
    return initialize(Decoder(ModelShape.from_config(config)), std=0.3).requires_grad_(False)


def greedy(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0).over({})


def plain_answer(prompt: tuple[int, ...], max_tokens: int) -> Sequence[int]:
    """The greedy ids of the plain decoder, alone."""
    return plain_choice(prompt, greedy(max_tokens))


@cache
def plain_choice(
    prompt: tuple[int, ...], sampling: Sampling, decoder: Decoder | None = None
) -> Sequence[int]:
    """The ids that the plain decoder chooses, alone."""
    return [t.id for t in decode(decoder or tiny_decoder(), [prompt], [sampling])]
