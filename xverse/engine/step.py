"""IDS -> LOGITS, ONE TOKEN EACH. A decode step of a decoder by the fused kernels.

Five operations a layer: norm + q, k, v; rope + store + attention; output + residual; norm + gate
and up + SwiGLU; down + residual; for many sequences the parts around products stand alone
(`residual.py`), and a mixture of experts is one operation in the place of the last two. Memory and
inputs stay in place, so that the step can be captured as a CUDA graph. The decoder itself is not
touched, and what computes each operation is chosen in `kernels/dispatch.py`; on a CPU that is the
plain reference.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from xverse.engine.residual import Matrix, Products, Residual, matrix, products
from xverse.errors import XverseError
from xverse.kernels import dispatch, reference, reference_few_bits
from xverse.kernels.reference import Norm, Scales
from xverse.kernels.reference_experts import Mixture
from xverse.model.decoder import Block, Decoder
from xverse.model.embedding import Embedding
from xverse.model.feedforward import MixtureOfExperts
from xverse.model.fuse import FusedAttention, FusedFeedForward
from xverse.model.linear import Linear, StackedLinear
from xverse.parallel.tensor import Gathered, Reduced
from xverse.quant.embedding import QuantizedEmbedding
from xverse.quant.linear import QuantizedLinear


class DecodeStep:
    """One new token for each of T sequences whose pages are given.

    Write `ids` [T] (int64) and `positions` [T] (int32), then call it: logits [T, V]. `pages` [T, P]
    (int32) lists each sequence's pages of `keys` and `values`, one [pages, K, S, E] a layer; fp8
    ones have `scales`. `turns` are cos and sin [S, E] of every position, if somebody has them.
    `computing`: what multiplies, in the place of the usual `products`.
    """

    def __init__(
        self,
        decoder: Decoder,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        pages: Tensor,
        scales: Sequence[Scales | None] | None = None,
        turns: tuple[Tensor, Tensor] | None = None,
        computing: Products | None = None,
    ) -> None:
        why_not = unfit(decoder)
        if why_not:
            raise XverseError(
                "This model has no fused decode step.",
                why_not,
                "Call the decoder itself, which computes every model.",
            )
        self.decoder, self.keys, self.values, self.pages = decoder, keys, values, pages
        self.scales = scales or [None] * len(keys)
        tokens, device, dtype = len(pages), decoder.device, decoder.dtype
        self.ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.products = computing or products(decoder, tokens)
        self.table_VD, self.head_VD = _ends(decoder, tokens)
        shape = decoder.shape
        heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.attend = dispatch.rotate_store_attend(
            device,
            dtype,
            tokens,
            heads,
            kv_heads,
            shape.head_dim,
            fp8=self.scales[0] is not None,
        ).call
        if shape.num_experts:
            self.mix = dispatch.mixture_rows(device, dtype, tokens, shape.num_experts).call
        capacity = torch.arange(pages.shape[1] * keys[0].shape[2], device=device)
        self.cos_SE, self.sin_SE = turns or decoder.rope.tables(capacity, None, dtype)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits [T, V] of `ids` at `positions`; their keys and values are kept."""
        stack = self.decoder.model
        stream = self.products.embed(self.ids, self.table_VD)
        for layer, block in enumerate(stack.layers):
            assert isinstance(block, Block)
            stream = self._block(layer, block, stream)
        return self._logits(stream)

    def _logits(self, stream: Residual) -> Tensor:
        decoder, head = self.decoder, self.decoder.lm_head
        logits, _ = self.products.read(stream, decoder.model.norm.spec, self.head_VD)
        if isinstance(head, Gathered):
            return head.gather(logits[:, : _own(head).weight.shape[0]].contiguous())
        return logits[:, : decoder.shape.vocab_size]

    def _block(self, layer: int, block: Block, stream: Residual) -> Residual:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, FusedAttention)
        project, norm = attention.qkv_proj, block.input_layernorm.spec
        qkv, stream = self.products.read(stream, norm, matrix(project), project.bias)
        mixed = self.attend(
            qkv,
            self.cos_SE,
            self.sin_SE,
            self.positions,
            self.pages,
            self.keys[layer],
            self.values[layer],
            self.scales[layer],
        )
        stream = self._add(attention.o_proj, mixed, stream)
        norm = block.post_attention_layernorm.spec
        if isinstance(mlp, MixtureOfExperts):
            more_TD = stream.more_TD
            x_TD = stream.x_TD if more_TD is None else stream.x_TD + more_TD
            return Residual(self._experts(mlp, x_TD, norm))
        assert isinstance(mlp, FusedFeedForward)
        project = mlp.gate_up_proj
        inner, stream = self.products.read(stream, norm, matrix(project), project.bias, gated=True)
        return self._add(mlp.down_proj, inner, stream)

    def _add(self, linear: nn.Module, x_TD: Tensor, stream: Residual) -> Residual:
        """The stream and what a layer adds to it, over all ranks where it is spread over some."""
        own, reduce = _own(linear), linear.reduce if isinstance(linear, Reduced) else None
        return self.products.add(x_TD, matrix(own), own.bias, stream, reduce)

    def _experts(self, mlp: MixtureOfExperts, x_TD: Tensor, norm: Norm) -> Tensor:
        shared = mlp.shared_experts
        gate_up_ND, down_DF = None, None
        if shared is not None:
            assert isinstance(shared, FusedFeedForward)
            gate_up, down = matrix(shared.gate_up_proj), matrix(_own(shared.down_proj))
            assert isinstance(gate_up, Tensor), "`unfit` has looked"
            assert isinstance(down, Tensor), "`unfit` has looked"
            gate_up_ND, down_DF = gate_up, down
        stacks = mlp.experts.stacks()
        return self.mix(
            x_TD, Mixture(mlp.router.weight, stacks, gate_up_ND, down_DF, mlp.top_k), norm
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
    if scaling is not None and scaling.rope_type == "dynamic":
        return "Its rotary frequencies change with the length of the sequence."
    linears: list[nn.Module] = [decoder.model.embed_tokens]
    if decoder.lm_head is not None:
        linears.append(decoder.lm_head)
    for block in decoder.model.layers:
        attention, mlp = block.self_attn, block.mlp
        if isinstance(mlp, Reduced):
            return "Its experts are spread over devices, and the fused mixture is that of one."
        if isinstance(mlp, MixtureOfExperts):
            linears += [*mlp.experts.children()]
        dense = mlp.shared_experts if isinstance(mlp, MixtureOfExperts) else mlp
        if isinstance(dense, FusedFeedForward):
            linears += [dense.gate_up_proj, dense.down_proj]
            if isinstance(mlp, MixtureOfExperts) and _is_quantized(linears[-2:]):
                return OF_EXPERTS
        elif dense is not None:
            return "Its projections are apart; `fuse` joins them."
        if not isinstance(attention, FusedAttention):
            return "Its projections are apart; `fuse` joins them."
        linears += [attention.qkv_proj, attention.o_proj]
    return next(filter(None, (_unread(_part(linear)) for linear in linears)), "")


OF_EXPERTS = "Its experts are quantized, and the fused mixture reads them as they are."


def _unread(layer: nn.Module) -> str:
    """Why the step does not read a layer's weights; empty where it does."""
    if not isinstance(layer, QuantizedLinear):
        known = type(layer) in (Linear, StackedLinear, Embedding)
        return "" if known else f"The fused step has no {type(layer).__name__}."
    if layer.weight.dim() != 2:
        return OF_EXPERTS
    if layer.order is not None:
        return "The columns of its quantized weights are sorted (GPTQ's desc_act)."
    why_not = reference_few_bits.why_not(layer.few_bits())
    return f"Of a quantized layer {why_not}." if why_not else ""


def _is_quantized(layers: Sequence[nn.Module]) -> bool:
    return any(isinstance(_part(layer), QuantizedLinear) for layer in layers)


def _part(module: nn.Module) -> nn.Module:
    """This rank's layer, where it is one of several."""
    return module.part if isinstance(module, Reduced | Gathered) else module


def _own(module: nn.Module) -> Linear | QuantizedLinear:
    part = _part(module)
    assert isinstance(part, Linear | QuantizedLinear), "`unfit` has looked"
    return part


def _ends(decoder: Decoder, rows: int) -> tuple[Matrix, Matrix]:
    """The table of token vectors, and the head; this rank's part of it where it is one of several.

    The head in the form with more rows, if there is one, where products of so many rows like it.
    """
    table: nn.Module = decoder.model.embed_tokens
    head = decoder.lm_head
    wide_VD = head.wide_ND if isinstance(head, Gathered) else decoder.wide_head_VD
    if wide_VD is not None and rows > 1:
        return matrix(table), wide_VD
    if head is not None:
        return matrix(table), matrix(_own(head))
    if isinstance(table, QuantizedEmbedding):
        return table, table.as_linear()
    return matrix(table), matrix(table)
