"""MODEL -> FEWER, LARGER PRODUCTS. q, k, v in one matrix, gate and up in another, for serving."""

import torch
from torch import Tensor, nn

from xverse.kernels.reference import rotate, swiglu
from xverse.model.attention import Attention
from xverse.model.cache import KV
from xverse.model.decoder import Decoder
from xverse.model.feedforward import FeedForward
from xverse.model.linear import Linear


class FusedAttention(nn.Module):
    """`Attention` with one input projection; q and k are rotated together."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.qkv_proj = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj

    def forward(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, kv: KV) -> Tensor:
        qkv = self.qkv_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        qk, v_TKE = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q_THE, k_TKE = rotate(qk, cos_TE, sin_TE).split((self.heads, self.kv_heads), dim=1)
        return self.o_proj(kv.attend(self.layer, q_THE, k_TKE, v_TKE).flatten(-2))


class FusedFeedForward(nn.Module):
    """`FeedForward` with gate and up in one matrix."""

    def __init__(self, feedforward: FeedForward) -> None:
        super().__init__()
        self.gate_up_proj = _join(feedforward.gate_proj, feedforward.up_proj)
        self.down_proj = feedforward.down_proj

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up_proj(x_TD).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate_TF, up_TF))


@torch.no_grad()
def fuse(decoder: Decoder) -> Decoder:
    """Join the projections of every block in place; equal results, about half the products.

    Layer by layer, so that the memory needed beside the model is one layer's.
    """
    for block in decoder.model.layers:
        if isinstance(block.self_attn, Attention):
            block.self_attn = FusedAttention(block.self_attn)
        if isinstance(block.mlp, FeedForward):
            block.mlp = FusedFeedForward(block.mlp)
    return decoder


def _join(*parts: Linear) -> Linear:
    joined = Linear.__new__(Linear)
    nn.Module.__init__(joined)
    joined.weight = nn.Parameter(torch.cat(tuple(part.weight for part in parts)), requires_grad=False)
    biases = [part.bias for part in parts if part.bias is not None]
    joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return joined
