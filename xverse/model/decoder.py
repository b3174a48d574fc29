"""IDS -> LOGITS. The decoder: embedding, blocks, norm, head; the same one trains and serves."""

import torch
from torch import Tensor, nn

from xverse.kernels import multiply
from xverse.model.attention import Attention
from xverse.model.cache import KV
from xverse.model.embedding import Embedding
from xverse.model.feedforward import FeedForward, MixtureOfExperts
from xverse.model.linear import Linear
from xverse.model.norm import RMSNorm
from xverse.model.rope import Rope
from xverse.model.shape import ModelShape


class Block(nn.Module):
    """Attention, then feed-forward, each on the normalized stream and added back to it."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        eps, in_fp32 = shape.rms_norm_eps, shape.norm_weight_in_fp32
        self.input_layernorm = RMSNorm(shape.hidden_size, eps, weight_in_fp32=in_fp32)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps, weight_in_fp32=in_fp32)
        self.mlp = (
            MixtureOfExperts(shape)
            if shape.num_experts
            else FeedForward(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        )

    def forward(
        self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, kv: KV, rows: Tensor | None = None
    ) -> Tensor:
        """The stream after this block, [T, D]; with `rows` [R] only theirs, [R, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos_TE, sin_TE, kv)
        if rows is not None:
            x_TD = x_TD[rows]
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Stack(nn.Module):
    """Everything up to the head; named `model` on disk."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape, i) for i in range(shape.num_hidden_layers))
        self.norm = RMSNorm(
            shape.hidden_size, shape.rms_norm_eps, weight_in_fp32=shape.norm_weight_in_fp32
        )


class Decoder(nn.Module):
    """An XVERSE or Llama model. Parameter names are those of the published checkpoints.

    A decoder runs over a flat row of T tokens; the KV door knows which sequences they belong to.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.rope = Rope(shape)
        self.model = Stack(shape)
        self.lm_head: nn.Module | None = (
            None if shape.tie_word_embeddings else Linear(shape.hidden_size, shape.vocab_size)
        )
        # The head's weight in a memory of more rows, of which the last are zero; see `fuse`.
        self.wide_head_VD: Tensor | None
        self.register_buffer("wide_head_VD", None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; weights that are quantized have other types."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.norm.weight.device

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, kv: KV, rows: Tensor | None = None
    ) -> Tensor:
        """Logits [T, V] of ids [T] at positions [T]; with `rows` [R] only theirs, [R, V]."""
        return self.logits(self.hidden(ids_T, positions_T, kv, rows))

    def hidden(
        self, ids_T: Tensor, positions_T: Tensor, kv: KV, rows: Tensor | None = None
    ) -> Tensor:
        """Normalized hidden states [T, D], from which `logits` follow; with `rows` [R] only theirs,
        [R, D]: no other token needs the last feed-forward."""
        stack = self.model
        x_TD = stack.embed_tokens(ids_T)
        cos_TE, sin_TE = self.turns(positions_T, kv, x_TD.dtype)
        *blocks, last = stack.layers
        for block in blocks:
            x_TD = block(x_TD, cos_TE, sin_TE, kv)
        x_TD = last(x_TD, cos_TE, sin_TE, kv, rows)
        normed: Tensor = stack.norm(x_TD)
        return normed

    def turns(self, positions_T: Tensor, kv: KV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's rotary angles, each [T, E]."""
        scaling = self.shape.rope_scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic"
        return self.rope.tables(positions_T, kv.lengths() if dynamic else None, dtype)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores of every vocabulary entry, [T, V], in x's dtype."""
        if self.wide_head_VD is not None:
            return multiply.linear(x_TD, self.wide_head_VD)[:, : self.shape.vocab_size]
        if self.lm_head is not None:
            return self.lm_head(x_TD)
        return self.model.embed_tokens.project(x_TD)


@torch.no_grad()
def initialize(decoder: Decoder, *, std: float = 0.02, seed: int = 0) -> Decoder:
    """Fresh weights: normal with `std` (published: 0.02), norms one, biases zero."""
    generator = torch.Generator(decoder.model.norm.weight.device).manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, std, generator=generator)
    return decoder
