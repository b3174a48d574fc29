"""MODEL -> FEWER, LARGER PRODUCTS. q, k, v in one matrix, gate and up in another, for serving."""

import torch
from torch import Tensor, nn

from xverse.kernels.reference import rotate, swiglu
from xverse.model.attention import Attention
from xverse.model.cache import KV
from xverse.model.decoder import Decoder
from xverse.model.feedforward import FeedForward, MixtureOfExperts
from xverse.model.linear import Linear, join


class FusedAttention(nn.Module):
    """`Attention` with one input projection; q and k are rotated together."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        q_proj, k_proj, v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.qkv_proj = join(q_proj, k_proj, v_proj)
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
        gate_proj, up_proj = feedforward.gate_proj, feedforward.up_proj
        self.gate_up_proj = join(gate_proj, up_proj)
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
        elif isinstance(block.mlp, MixtureOfExperts):
            shared = block.mlp.shared_experts
            if isinstance(shared, FeedForward):
                block.mlp.shared_experts = FusedFeedForward(shared)
    head = decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head
    if not isinstance(head, Linear | nn.Embedding):
        return decoder  # parts on several devices are joined there, each of which came here alone
    if head.weight.is_cuda and decoder.wide_head_VD is None:
        _widen(decoder, head)
    return decoder


HEAD_ROWS = 128  # cuBLAS is 2.7 times as fast with 100,608 outputs as with 100,534 (1,024 tokens)


def _widen(decoder: Decoder, head: Linear | nn.Embedding) -> None:
    """Rows of zeros below the head, whose own weight becomes a part of the wider one."""
    weight_VD = head.weight
    rows = -(-len(weight_VD) // HEAD_ROWS) * HEAD_ROWS
    wide_VD = weight_VD.new_zeros(rows, weight_VD.shape[1])
    wide_VD[: len(weight_VD)] = weight_VD
    weight_VD.data = wide_VD[: len(weight_VD)]
    decoder.wide_head_VD = wide_VD
