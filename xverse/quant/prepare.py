"""MODEL -> MODEL FOR THIS CPU. Quantized layers repacked, and what stands around them taken in.

For serving only: the repacked layers have no part in `state_dict`, and what is to be saved is the
model before. Call it after `fuse`, which joins projections.
"""

from typing import cast

import torch
from torch import Tensor, nn

from xverse.kernels import native
from xverse.kernels.attend_cpu import rotate_heads
from xverse.kernels.packed import PackedWeights, group_of
from xverse.kernels.reference import Norm
from xverse.log import warn_once
from xverse.model.cache import KV
from xverse.model.decoder import Block, Decoder
from xverse.model.embedding import Embedding
from xverse.model.fuse import FusedAttention, FusedFeedForward
from xverse.quant.embedding import QuantizedEmbedding
from xverse.quant.linear import QuantizedLinear


class PackedLinear(nn.Module):
    """A `QuantizedLinear` on a CPU whose input is rounded too, in groups: to 8 bits where weights
    have 4, to 15 where they have 8."""

    def __init__(
        self, layer: QuantizedLinear, *, norm: Norm | None = None, gated: bool = False
    ) -> None:
        """`norm` and `gated` as `PackedWeights` takes them in."""
        super().__init__()
        self.order = layer.order
        scale, zero = layer.scale, layer.zero
        if layer.scheme.group_size is None:
            scale, zero = scale[:, None], None if zero is None else zero[:, None]
        self.packed = PackedWeights(
            layer.integers(),
            scale,
            zero,
            layer.bias,
            bits=layer.scheme.bits,
            norm=norm,
            gated=gated,
        )

    def forward(self, x_TD: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """The layer's product, added to the residual where one is given."""
        if self.order is not None:
            x_TD = x_TD[..., self.order]
        return self.packed.multiply(x_TD, residual_TN)


class PackedEmbedding(PackedLinear):
    """A `QuantizedEmbedding`, repacked: one memory for the table and the tied head."""

    def __init__(self, layer: QuantizedEmbedding) -> None:
        super().__init__(layer)
        self.dtype = layer.scale.dtype

    def forward(self, ids_T: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """The vectors of ids, [..., D]."""
        assert residual_TN is None, "a table is looked up"
        return self.packed.rows_of(ids_T).to(self.dtype)

    def project(self, x_TD: Tensor) -> Tensor:
        """As `Embedding.project`."""
        return self.packed.multiply(x_TD)


class PackedBlock(nn.Module):
    """A `Block` of four products, which apply norms, SwiGLU and residuals themselves."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, FusedAttention), "`_why_whole_not` has looked"
        assert isinstance(mlp, FusedFeedForward), "`_why_whole_not` has looked"
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.qkv_proj = PackedLinear(_own(attention.qkv_proj), norm=block.input_layernorm.spec)
        self.o_proj = PackedLinear(_own(attention.o_proj))
        norm = block.post_attention_layernorm.spec
        self.gate_up_proj = PackedLinear(_own(mlp.gate_up_proj), norm=norm, gated=True)
        self.down_proj = PackedLinear(_own(mlp.down_proj))

    def products(self) -> tuple[PackedLinear, ...]:
        """The four, in the order in which they are computed."""
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj

    def forward(
        self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, kv: KV, rows: Tensor | None = None
    ) -> Tensor:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv_THE = self.qkv_proj(x_TD).view(-1, sum(heads), self.head_dim)
        rotate_heads(qkv_THE, cos_TE, sin_TE, self.heads + self.kv_heads)
        mixed_THE = kv.attend(self.layer, *qkv_THE.split(heads, dim=1))
        if rows is not None:
            x_TD, mixed_THE = x_TD[rows], mixed_THE[rows]
        x_TD = self.o_proj(mixed_THE.flatten(-2), x_TD)
        return self.down_proj(self.gate_up_proj(x_TD), x_TD)


@torch.no_grad()
def prepare(decoder: Decoder, *, blocks: bool = True) -> Decoder:
    """Repack the quantized layers of a fused decoder in place, one after another.

    Experts, fp8 weights, and everything on a GPU or where nothing was compiled stay as they are:
    `why_not` says so of a layer. Without `blocks` each layer is
    repacked by itself, for whoever adds something behind it.
    """
    stack = decoder.model
    for number, block in enumerate(stack.layers):
        assert isinstance(block, Block), "it is prepared once"
        if not _why_whole_not(block):
            if blocks:
                stack.layers[number] = PackedBlock(block)
                continue
            warn_once(
                "layers are repacked one by one, and decode slower: adapters stand behind them"
            )
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if not why_not(child):
                    setattr(parent, name, PackedLinear(_own(child)))
    table: nn.Module = stack.embed_tokens
    if isinstance(table, QuantizedEmbedding) and not why_not(table):
        stack.embed_tokens = cast(Embedding, PackedEmbedding(table))
    if decoder.lm_head is not None and not why_not(decoder.lm_head):
        decoder.lm_head = PackedLinear(_own(decoder.lm_head))
    return decoder


def rows_stand_alone(decoder: Decoder) -> bool:
    """Whether a row's logits are the same bits whatever rows stand beside it."""
    head = decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head
    return isinstance(head, PackedLinear)


def why_not(module: nn.Module) -> str:
    """Why a module is not repacked; empty where it is."""
    if not isinstance(module, QuantizedLinear):
        return "its weights are not quantized"
    if module.weight.dim() != 2:
        return "it is a stack of experts"
    if module.scheme.kind == "float":
        return "its weights are fp8"
    if module.weight.device.type != "cpu":
        return f"it is on {module.weight.device.type}"
    if group_of(module.inputs, module.scheme.group_size) % 8:
        return f"its {module.inputs} inputs come in no groups of 8"
    return native.why_not()


def _why_whole_not(block: Block) -> str:
    attention, mlp = block.self_attn, block.mlp
    if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedFeedForward):
        return "its projections are apart, or it has experts"
    layers = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
    return next(filter(None, map(why_not, layers)), "")


def _own(module: nn.Module) -> QuantizedLinear:
    assert isinstance(module, QuantizedLinear), "`why_not` has looked"
    return module
