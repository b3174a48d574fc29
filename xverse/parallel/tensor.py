"""DECODER -> THIS RANK'S DECODER. Layers are cut by the plan, and their results joined by a mesh.

`keep_part` cuts one layer, also while a model is being loaded; `connect` makes a decoder of cut
layers whole again, by sums and gathers over all ranks; `shard` does both.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from xverse.kernels import multiply
from xverse.model.attention import Attention
from xverse.model.decoder import Decoder
from xverse.model.feedforward import FeedForward
from xverse.model.fuse import FusedAttention, FusedFeedForward
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.parallel.plan import local_shape, part_of


class Reduce(Protocol):
    """The sum over all ranks of what each has computed, and on top of it the residual."""

    def __call__(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor: ...


class Gather(Protocol):
    """The columns of all ranks side by side, on each of them."""

    def __call__(self, x_TN: Tensor) -> Tensor: ...


class Joins(Protocol):
    """What `connect` asks of a mesh; the same calls must be made in the same order on all ranks."""

    rank: int
    size: int

    def reduce(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor: ...

    def gather(self, x_TN: Tensor) -> Tensor: ...

    def reserve(self, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
        """Make ready for sums of [T, hidden] and gathers to [T, vocabulary]."""
        ...


@runtime_checkable
class Splits(Protocol):
    """A linear layer that knows how to split itself."""

    def keep_outputs(self, first: int, last: int, of: int) -> nn.Module: ...

    def keep_inputs(self, first: int, last: int, of: int) -> nn.Module: ...


class Reduced(nn.Module):
    """A module of which each rank computes a part of every output; the parts are added."""

    def __init__(self, part: nn.Module, reduce: Reduce) -> None:
        super().__init__()
        self.part, self.reduce = part, reduce

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.reduce(self.part(x_TD))


class Gathered(nn.Module):
    """A linear layer of which each rank has some of the outputs.

    `wide_ND` is the part's weight in a memory of more rows, where `fuse` has made one.
    """

    def __init__(self, part: nn.Module, gather: Gather, wide_ND: Tensor | None = None) -> None:
        super().__init__()
        self.part, self.gather = part, gather
        self.wide_ND: Tensor | None
        self.register_buffer("wide_ND", wide_ND, persistent=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.wide_ND is None:
            return self.gather(self.part(x_TD))
        assert isinstance(self.part, Linear), "of which it is a view"
        wide_TN = multiply.linear(x_TD, self.wide_ND)
        return self.gather(wide_TN[:, : len(self.part.weight)].contiguous())


def keep_part(name: str, module: nn.Module, shape: ModelShape, rank: int, size: int) -> nn.Module:
    """What rank `rank` keeps of the module `name` of a decoder of this (whole) shape.

    A layer that is cut comes with memory of its own, so that the whole one can go.
    """
    part = part_of(name, shape, rank, size)
    if part is None:
        return module
    assert isinstance(module, Splits), f"{name} cannot split itself"
    keep = module.keep_outputs if part.side == "outputs" else module.keep_inputs
    kept = keep(part.first, part.last, part.units)
    for key, parameter in list(kept.named_parameters()):
        setattr(kept, key, nn.Parameter(_own(parameter), requires_grad=False))
    for key, buffer in list(kept.named_buffers()):
        setattr(kept, key, _own(buffer))
    return kept


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def shard(decoder: Decoder, mesh: Joins) -> Decoder:
    """Cut a whole decoder to the part of this rank, and connect it, in place."""
    for name, module in list(decoder.named_modules()):
        kept = keep_part(name, module, decoder.shape, mesh.rank, mesh.size)
        if kept is not module:
            decoder.set_submodule(name, kept)
    return connect(decoder, mesh)


def connect(decoder: Decoder, mesh: Joins) -> Decoder:
    """Join the results of a decoder whose layers are cut, fused or not, in place.

    From then on its shape is that of this rank's part. All ranks must call it at the same time.
    """
    whole = decoder.shape
    decoder.shape = local_shape(whole, mesh.size)
    for block in decoder.model.layers:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, Attention | FusedAttention), "the two kinds there are"
        attention.heads = decoder.shape.num_attention_heads
        attention.kv_heads = decoder.shape.num_key_value_heads
        attention.o_proj = Reduced(attention.o_proj, mesh.reduce)
        if isinstance(mlp, FeedForward | FusedFeedForward):
            mlp.down_proj = Reduced(mlp.down_proj, mesh.reduce)
        else:  # one sum for all experts together
            assert isinstance(mlp, nn.Module), "a mixture of experts"
            block.mlp = Reduced(mlp, mesh.reduce)
    mesh.reserve(whole.hidden_size, whole.vocab_size, decoder.dtype)
    head, wide_VD = decoder.lm_head, decoder.wide_head_VD
    decoder.wide_head_VD = None
    if head is None:  # tied: a part of the embedding, which every rank has whole
        part = part_of("lm_head", whole, mesh.rank, mesh.size)
        assert part is not None, "the table has the head"
        table = decoder.model.embed_tokens.as_linear()
        head = table.keep_outputs(part.first, part.last, part.units)
        wide_VD = None
    if not (
        wide_VD is not None
        and isinstance(head, Linear)
        and wide_VD.data_ptr() == head.weight.data_ptr()
    ):
        wide_VD = None  # the head is quantized, or was widened before it was cut
    decoder.lm_head = Gathered(head, mesh.gather, wide_VD)
    return decoder
