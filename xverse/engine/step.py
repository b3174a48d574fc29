"""IDS -> LOGITS, ONE TOKEN EACH. A decode step of a dense decoder by the fused kernels.

Five operations a layer: norm + q, k, v; rope + store + attention; output + residual; norm + gate
and up + SwiGLU; down + residual. Memory and inputs stay in place, so that the step can be captured
as a CUDA graph. The decoder itself is not touched, and what computes each operation is chosen in
`kernels/dispatch.py`; on a CPU that is the plain reference.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from xverse.errors import XverseError
from xverse.kernels import dispatch, reference
from xverse.kernels.reference import Norm
from xverse.model.decoder import Block, Decoder
from xverse.model.fuse import FusedAttention, FusedFeedForward
from xverse.model.linear import Linear
from xverse.model.norm import RMSNorm
from xverse.parallel.tensor import Gathered, Reduced


class DecodeStep:
    """One new token for each of T sequences whose pages are given.

    Write `ids` [T] (int64) and `positions` [T] (int32), then call it: logits [T, V]. `pages` [T, P]
    (int32) lists each sequence's pages of `keys` and `values`, one [pages, K, S, E] a layer.
    """

    def __init__(
        self, decoder: Decoder, keys: Sequence[Tensor], values: Sequence[Tensor], pages: Tensor
    ) -> None:
        why_not = unfit(decoder)
        if why_not:
            raise XverseError(
                "This model has no fused decode step.",
                why_not,
                "Call the decoder itself, which computes every model.",
            )
        self.decoder, self.keys, self.values, self.pages = decoder, keys, values, pages
        weight = decoder.model.embed_tokens.weight
        tokens, device = len(pages), weight.device
        self.ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.multiply = dispatch.multiply_rows(device, weight.dtype, tokens).call
        shape = decoder.shape
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.attend = dispatch.rotate_store_attend(
            device, weight.dtype, tokens, heads, kv_heads, shape.head_dim
        ).call
        capacity = torch.arange(pages.shape[1] * keys[0].shape[2], device=device)
        self.cos_SE, self.sin_SE = decoder.rope.tables(capacity, None, weight.dtype)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits [T, V] of `ids` at `positions`; their keys and values are kept."""
        stack = self.decoder.model
        x_TD = functional.embedding(self.ids, stack.embed_tokens.weight)
        for layer, block in enumerate(stack.layers):
            assert isinstance(block, Block)
            x_TD = self._block(layer, block, x_TD)
        head = self.decoder.lm_head
        own = stack.embed_tokens if head is None else _own(head)
        logits = self.multiply(x_TD, own.weight, norm=_norm(stack.norm))
        return head.gather(logits) if isinstance(head, Gathered) else logits

    def _block(self, layer: int, block: Block, x_TD: Tensor) -> Tensor:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, FusedAttention)
        assert isinstance(mlp, FusedFeedForward)
        qkv = self._linear(attention.qkv_proj, x_TD, norm=_norm(block.input_layernorm))
        mixed = self.attend(
            qkv,
            self.cos_SE,
            self.sin_SE,
            self.positions,
            self.pages,
            self.keys[layer],
            self.values[layer],
        )
        x_TD = self._add(attention.o_proj, mixed, x_TD)
        norm = _norm(block.post_attention_layernorm)
        inner = self._linear(mlp.gate_up_proj, x_TD, norm=norm, gated=True)
        return self._add(mlp.down_proj, inner, x_TD)

    def _add(self, linear: nn.Module, x_TD: Tensor, residual_TN: Tensor) -> Tensor:
        """The residual and what a layer adds to it, over all ranks where it is spread over some."""
        if isinstance(linear, Reduced):
            return linear.reduce(self._linear(_own(linear), x_TD), residual_TN)
        return self._linear(_own(linear), x_TD, residual_TN=residual_TN)

    def _linear(
        self,
        linear: Linear,
        x_TD: Tensor,
        *,
        norm: Norm | None = None,
        residual_TN: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        return self.multiply(
            x_TD, linear.weight, bias_N=linear.bias, norm=norm, residual_TN=residual_TN, gated=gated
        )

    def capture(self, then: Callable[[Tensor], None] | None = None) -> Callable[[], Tensor]:
        """The step as a CUDA graph, followed by `then` (sampling, say); call it to run the step.

        The first runs, which compile, write keys and values at `positions`, as any step does.
        Raises XverseError where attention is the reference, which asks the host for positions.
        """
        if self.attend is reference.rotate_store_attend:
            device, dtype = self.cos_SE.device, self.cos_SE.dtype
            raise XverseError(
                "This decode step cannot be captured as a CUDA graph.",
                str(dispatch.rotate_store_attend(device, dtype)),
                "Call the step itself, or use bfloat16 on an NVIDIA GPU with Triton.",
            )
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: NCCL's watchdog asks for its events meanwhile, on another.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self()
            if then is not None:
                then(logits)

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def unfit(decoder: Decoder) -> str:
    """Why a decoder has no fused step; empty where it has one."""
    scaling = decoder.shape.rope_scaling
    if decoder.shape.num_experts:
        return "It is a mixture of experts, and the fused step is for dense models."
    if scaling is not None and scaling.rope_type == "dynamic":
        return "Its rotary frequencies change with the length of the sequence."
    for block in decoder.model.layers:
        attention, mlp = block.self_attn, block.mlp
        if not (isinstance(attention, FusedAttention) and isinstance(mlp, FusedFeedForward)):
            return "Its projections are apart; `fuse` joins them."
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        if not all(type(_part(linear)) is Linear for linear in linears):
            return "Its weights are quantized, and the fused step reads them as they are."
    return ""


def _part(module: nn.Module) -> nn.Module:
    """This rank's layer, where it is one of several."""
    return module.part if isinstance(module, Reduced | Gathered) else module


def _own(module: nn.Module) -> Linear:
    part = _part(module)
    assert isinstance(part, Linear), "`unfit` has looked"
    return part


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight, norm.eps, norm.weight_in_fp32)
