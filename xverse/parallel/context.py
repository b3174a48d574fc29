"""LONG ROWS -> PARTS OF ROWS. Context parallel: each rank has a part of the tokens of all layers.

Only attention looks across tokens. For it, ranks change what they have: from all heads of some
tokens to all tokens of some heads, and back (DeepSpeed-Ulysses, Jacobs et al. 2023).
"""

import functools
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.model.cache import KV
from xverse.model.decoder import Block, Decoder
from xverse.parallel.collect import exchange
from xverse.parallel.grid import Grid


class Exchanged:
    """The KV door of all tokens, for ranks that each have a part of them."""

    def __init__(self, kv: KV, group: dist.ProcessGroup) -> None:
        self.kv, self.group = kv, group

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """As KV.attend, of this rank's tokens. -> [T / n, H, E]."""
        parts = (_to_heads(x, self.group) for x in (q_THE, k_TKE, v_TKE))
        return _to_tokens(self.kv.attend(layer, *parts), self.group)

    def lengths(self) -> Tensor:
        raise AssertionError("shapes that ask for lengths are refused")


def spread_context(decoder: Decoder, grid: Grid) -> Decoder:
    """The decoder whose `hidden` takes this rank's part of ids and positions along `context`, and
    the KV door of all. XverseError where its heads do not divide."""
    size = grid.size("context")
    if size == 1:
        return decoder
    shape, parts = decoder.shape, size * grid.size("tensor")
    if shape.num_attention_heads % parts or shape.num_key_value_heads % parts:
        raise XverseError(
            f"This model cannot be trained with context = {size} in [mesh].",
            f"Its {shape.num_attention_heads} heads and {shape.num_key_value_heads} key/value "
            f"heads cannot be divided by context * tensor = {parts}.",
            "Take a smaller number.",
        )
    if shape.rope_scaling is not None and shape.rope_scaling.rope_type == "dynamic":
        raise XverseError(
            "Dynamic NTK scaling cannot be trained with the mesh axis 'context'.",
            "Its rotary base depends on the length of each document, which no rank has whole.",
            "Set context to 1 in [mesh], or train with --rope-theta instead of --ntk-factor.",
        )
    for block in decoder.model.layers:
        cast(Block, block).self_attn.register_forward_pre_hook(
            functools.partial(_through_exchange, grid.group("context"))
        )
    return decoder


def own_part(x_T: Tensor, grid: Grid) -> Tensor:
    """This rank's part of the tokens of a pass."""
    return x_T.chunk(grid.size("context"))[grid.place("context")]


def _through_exchange(
    group: dist.ProcessGroup, module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    *others, kv = inputs
    return *others, Exchanged(kv, group)


def _to_heads(x_THE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T / n, H, E] -> [T, H / n, E]."""
    by_rank = x_THE.unflatten(1, (group.size(), -1)).transpose(0, 1).flatten(0, 1)
    return exchange(by_rank, None, None, group)


def _to_tokens(x_THE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, H / n, E] -> [T / n, H, E]."""
    found = exchange(x_THE, None, None, group).unflatten(0, (group.size(), -1))
    return found.transpose(0, 1).flatten(1, 2)
