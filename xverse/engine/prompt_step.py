"""PROMPT CHUNKS -> HIDDEN, ON A GPU. Many rows of several sequences through the fused kernels.

A layer is four products by the library, and between them one kernel each: residual and norm, rope
and store, attention, SwiGLU. Where many rows meet fp8 weights, what feeds a product is made in 8
bits at once, and the product is one of 8 bits (`QuantizedLinear.rounds`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xverse.engine.paged import Paged
from xverse.kernels import dispatch, dispatch_quantized, reference
from xverse.kernels.reference import Norm
from xverse.kernels.reference_steps import RoundedRows
from xverse.model.decoder import Block, Decoder
from xverse.model.fuse import FusedAttention, FusedFeedForward
from xverse.model.linear import Linear
from xverse.quant.linear import QuantizedLinear

WHOLE_FROM, NEVER = 1024, 2**62  # rows; below, attention over pages takes a hundredth of the time
AT_ONCE = 4096  # rows of a product: 8,191 tokens of 7B take an H200 175 ms so, and 188 in one piece
WHOLE_MULTIPLE = 128  # what rows are filled up to, so that few lengths ever come


@dataclass(frozen=True)
class Prompts:
    """Chunks of B sequences, T rows in all, as the device knows them.

    ids, positions [T] int32, places [T] int64 (page * page size + slot of each row); tables [B, P],
    offsets [B + 1] of each chunk's rows, held [B] tokens before it, int32. What the host knows:
    the `longest` chunk's rows, and whether this is one prompt from its beginning, to be attended to
    as a `whole`. `rows_R` [R] int64 are those that are read, None where all are.
    """

    ids_T: Tensor
    positions_T: Tensor
    places_T: Tensor
    tables_BP: Tensor
    offsets_B1: Tensor
    held_B: Tensor
    longest: int
    whole: bool
    rows_R: Tensor | None = None


class PromptStep:
    """Prompt rows through a decoder whose projections are joined (`fuse`).

    A prompt that begins here, is alone and has `whole_from` rows is attended to as a whole, not
    through its pages; it may be followed by rows that nobody reads.
    """

    def __init__(self, decoder: Decoder, kv: Paged) -> None:
        self.kv = kv
        device, dtype = decoder.device, decoder.dtype
        fp8 = kv.scales(0) is not None
        self.add_norm = dispatch.add_norm(device, dtype).call
        self.swiglu = dispatch.swiglu_joined(device, dtype).call
        self.add_norm_rounded = dispatch_quantized.add_norm_rounded(device, dtype).call
        self.swiglu_rounded = dispatch_quantized.swiglu_rounded(device, dtype).call
        self.rotate_store = dispatch.rotate_store(device, dtype, fp8=fp8).call
        self.attend = dispatch.attend_chunks(device, dtype, fp8=fp8).call
        shape = decoder.shape
        grouped = shape.num_attention_heads != shape.num_key_value_heads
        self.attend_whole = dispatch.attend_whole(device, dtype, grouped=grouped).call
        self.whole_from = NEVER if self.attend_whole is reference.attend else WHOLE_FROM
        capacity = torch.arange(decoder.shape.context_length, device=device)
        self.cos_SE, self.sin_SE = decoder.rope.tables(capacity, None, dtype)

    def __call__(self, prompts: Prompts, decoder: Decoder) -> Tensor:
        """Normalized hidden states [R, D] of the rows that are read; keys and values of all are in
        the pages then. `decoder` is the one that this is the step of, or its twin."""
        stack, rows_R = decoder.model, prompts.rows_R
        x_TD = stack.embed_tokens(prompts.ids_T)
        delta_TD: Tensor | None = None
        for layer, block in enumerate(stack.layers):
            assert isinstance(block, Block)
            attention, mlp = block.self_attn, block.mlp
            assert isinstance(attention, FusedAttention)
            norm, project = block.input_layernorm.spec, attention.qkv_proj
            x_TD, normed = self._normed(x_TD, delta_TD, norm, project)
            mixed_TN = self._attention(layer, attention, normed, prompts)
            if rows_R is not None and layer == len(stack.layers) - 1:  # no other needs the rest
                x_TD, mixed_TN = x_TD[rows_R], mixed_TN[rows_R]
                if not len(rows_R):
                    return x_TD
            delta_TD = _in_parts(attention.o_proj, mixed_TN)
            norm = block.post_attention_layernorm.spec
            if isinstance(mlp, FusedFeedForward):
                x_TD, normed = self._normed(x_TD, delta_TD, norm, mlp.gate_up_proj)
                delta_TD = self._feedforward(mlp, normed)
            else:
                x_TD, normed_TD = self.add_norm(x_TD, delta_TD, norm)
                delta_TD = mlp(normed_TD)
        return self.add_norm(x_TD, delta_TD, stack.norm.spec)[1]

    def _normed(
        self, x_TD: Tensor, delta_TD: Tensor | None, norm: Norm, project: nn.Module
    ) -> tuple[Tensor, Tensor | RoundedRows]:
        """The residual stream, and its norm as the layer that reads it takes it."""
        rounded = _rounds(project, len(x_TD))
        return (self.add_norm_rounded if rounded else self.add_norm)(x_TD, delta_TD, norm)

    def _attention(
        self, layer: int, attention: FusedAttention, x_TD: Tensor | RoundedRows, prompts: Prompts
    ) -> Tensor:
        """What the heads have read, side by side: [T, H * E]."""
        keys, values, scales = self.kv.keys[layer], self.kv.values[layer], self.kv.scales(layer)
        qkv_TN = _in_parts(attention.qkv_proj, x_TD)
        q_THE = self.rotate_store(
            qkv_TN, self.cos_SE, self.sin_SE, prompts.positions_T, prompts.places_T,
            keys, values, scales=scales, in_place=prompts.whole,
        )  # fmt: skip
        if prompts.whole:
            heads = qkv_TN.unflatten(-1, (-1, attention.head_dim))
            _, k_TKE, v_TKE = heads.split(
                (attention.heads, attention.kv_heads, attention.kv_heads), 1
            )
            return self.attend_whole(q_THE, k_TKE, v_TKE).flatten(-2)
        mixed_THE = self.attend(
            q_THE, keys, values, prompts.tables_BP, prompts.offsets_B1, prompts.held_B,
            most=prompts.longest, scales=scales,
        )  # fmt: skip
        return mixed_THE.flatten(-2)

    def _feedforward(self, mlp: FusedFeedForward, x_TD: Tensor | RoundedRows) -> Tensor:
        joined_TF2 = _in_parts(mlp.gate_up_proj, x_TD)
        rounded = _rounds(mlp.down_proj, len(joined_TF2))
        inner = (self.swiglu_rounded if rounded else self.swiglu)(joined_TF2)
        return _in_parts(mlp.down_proj, inner)


def _rounds(linear: nn.Module, rows: int) -> bool:
    """Whether a layer takes so many rows in 8 bits."""
    return isinstance(linear, QuantizedLinear) and linear.rounds(rows)


def _in_parts(linear: nn.Module, x_TD: Tensor | RoundedRows) -> Tensor:
    """The product of many rows; of a plain layer without a bias AT_ONCE of them at a time."""
    if isinstance(x_TD, RoundedRows):
        assert isinstance(linear, QuantizedLinear), "others take no rows in 8 bits"
        return linear.multiply_rounded(x_TD)
    if type(linear) is not Linear or linear.bias is not None or len(x_TD) <= AT_ONCE:
        return linear(x_TD)
    y_TN = x_TD.new_empty(len(x_TD), linear.weight.shape[0])
    for x, y in zip(x_TD.split(AT_ONCE), y_TN.split(AT_ONCE), strict=True):
        torch.mm(x, linear.weight.T, out=y)
    return y_TN
