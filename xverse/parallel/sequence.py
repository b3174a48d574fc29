"""DECODER -> ITS PART OF EVERY MATRIX. Tensor parallel training, with sequence parallel between.

                 T / n tokens, D            T tokens, D / n heads          T / n tokens, D
    embedding ------ norm ------ gather ------ attention ------ add ------ norm ------ ...

Between the products every rank has a part of the tokens, of which it keeps and normalizes no more
than that (Korthikanti et al. 2022, Reducing activation recomputation, section 4.2).
"""

import functools
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.model.decoder import Block, Decoder
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.parallel.collect import add_tokens, gather_tokens
from xverse.parallel.grid import Grid
from xverse.parallel.plan import part_of, vocabulary_share
from xverse.parallel.tensor import keep_part
from xverse.parallel.vocabulary import Rows, spread_embedding, spread_head


@torch.no_grad()
def spread_tensors(decoder: Decoder, grid: Grid) -> Decoder:
    """Cut a whole decoder to this rank's part along `tensor`, in place, and connect the parts.

    `hidden` of it takes all T ids and gives all T tokens, which must divide by the ranks. Its shape
    stays the whole one. XverseError where the shape does not divide.
    """
    place, size = grid.place("tensor"), grid.size("tensor")
    if size == 1:
        return decoder
    require_divisible(decoder.shape, size)
    for name, module in list(decoder.named_modules()):
        if name == "lm_head":
            continue
        kept = keep_part(name, module, decoder.shape, place, size)
        if kept is not module:
            decoder.set_submodule(name, kept.requires_grad_(True))
    _spread_vocabulary(decoder, grid)
    for block in decoder.model.layers:
        block = cast(Block, block)
        _connect(block.self_attn, grid.group("tensor"))
        _connect(block.mlp, grid.group("tensor"))
    decoder.model.norm.register_forward_hook(
        functools.partial(_gathered_after, grid.group("tensor"))
    )
    return decoder


def is_partial(name: str, shape: ModelShape) -> bool:
    """Whether the ranks along `tensor` each have the whole of this weight, and a part of its
    gradient: norms see a part of the tokens, routers a part of what experts answer."""
    return tensor_side(name, shape, 2) is None


def tensor_side(name: str, shape: ModelShape, size: int) -> int | None:
    """Which dimension of this weight is cut along `tensor`, counted from the end; None: none."""
    module = name.removesuffix(".weight")
    if module == "model.embed_tokens":
        return -2
    part = part_of(module, shape, 0, size)
    if part is None:
        return None
    return -2 if part.side == "outputs" else -1


def require_divisible(shape: ModelShape, size: int) -> None:
    """Raise XverseError where a model of this shape cannot be trained over `size` ranks."""
    share = vocabulary_share(shape.vocab_size, size)
    for what, number, fits in (
        ("heads", shape.num_attention_heads, shape.num_attention_heads % size == 0),
        ("key/value heads", shape.num_key_value_heads, shape.num_key_value_heads % size == 0),
        ("inner width", shape.intermediate_size, shape.intermediate_size % size == 0),
        ("vocabulary", shape.vocab_size, share * (size - 1) < shape.vocab_size),
        ("biases", 0, not (shape.attention_bias or shape.mlp_bias)),
    ):
        if not fits:
            raise XverseError(
                f"This model cannot be trained with tensor = {size} in [mesh].",
                f"Its {what} ({number}) cannot be divided by {size}."
                if number
                else "It has biases in its linear layers, which are not built for this axis.",
                "Take a smaller number, or `shard` and `pipeline` instead.",
            )


def _spread_vocabulary(decoder: Decoder, grid: Grid) -> None:
    vocabulary, size = decoder.shape.vocab_size, grid.size("tensor")
    share = vocabulary_share(vocabulary, size)
    first = grid.place("tensor") * share
    last = min(first + share, vocabulary)
    rows = Rows(first, grid.group("tensor"))
    decoder.model.embed_tokens = spread_embedding(decoder.model.embed_tokens, first, last, rows)
    if decoder.lm_head is not None:
        assert isinstance(decoder.lm_head, Linear), "weights are cut before they are changed"
        decoder.lm_head = spread_head(decoder.lm_head, first, last, rows).requires_grad_(True)


def _connect(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Hooks, and not modules around it: the names of its weights stay those on disk."""
    module.register_forward_pre_hook(functools.partial(_gathered_before, group))
    module.register_forward_hook(functools.partial(_added_after, group))


def _gathered_before(
    group: dist.ProcessGroup, module: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    return gather_tokens(inputs[0], group), *inputs[1:]


def _added_after(
    group: dist.ProcessGroup, module: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    return add_tokens(output, group)


def _gathered_after(
    group: dist.ProcessGroup, module: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    return gather_tokens(output, group)
