"""SHAPE OR FOLDER -> DECODER TO TRAIN. Weights fresh or loaded, and what is put around them.

Each step takes a decoder and gives one, in a fixed order: cut to this rank's part, 8-bit products,
balance of experts, recompute, compile, shards.
"""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager as ContextManager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.attention.varlen  # which makes its operator known to torch.ops
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from xverse.checkpoint import load
from xverse.checkpoint.weights import open_weights
from xverse.device import pick_dtype
from xverse.errors import XverseError
from xverse.model.decoder import Block, Decoder
from xverse.model.embedding import Embedding
from xverse.model.feedforward import MixtureOfExperts
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.parallel.context import spread_context
from xverse.parallel.experts import spread_experts
from xverse.parallel.fsdp import offload_policy, shard
from xverse.parallel.grid import grid_of
from xverse.parallel.layout import Layout
from xverse.parallel.pipeline import spread_layers, stages_of
from xverse.parallel.ranks import Ranks
from xverse.parallel.sequence import spread_tensors
from xverse.quant.embedding import QuantizedEmbedding
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize_module
from xverse.quant.recipe import Recipe
from xverse.train import balance, eight_bits
from xverse.train.lora import add_lora
from xverse.train.options import Computing, Training
from xverse.train.tuning import Lora

STD = 0.02  # `initializer_range` of the published configs

# What selective recompute keeps: results that cost much to make again, for the room they take.
KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.xverse.multiply_frozen.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.torch_attn._varlen_attn.default,
)


def fresh(shape: ModelShape, options: Training, ranks: Ranks) -> Decoder:
    """A decoder of this shape with new weights: the same ones for a seed and any number of ranks.

    Normal with the published deviation, norms one, biases zero; a router stays in fp32.
    """
    with torch.device("meta"):
        decoder = Decoder(shape).to(dtype_of(options.compute, ranks))
    for block in decoder.model.layers:
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp.router.float()
    decoder = prepared(decoder, options, ranks).to_empty(device=home(options, ranks))
    for stage in stages_of(decoder):  # no modules of the decoder, and FSDP2's units all the same
        stage.to_empty(device=ranks.device)
    host = options.compute.offload == "parameters"
    layout = Layout(shape, grid_of(ranks, options.mesh), host=host)
    _fill(decoder, layout, options.seed, ranks.device)
    return decoder.train()


def continued(shape: ModelShape, folder: Path, options: Training, ranks: Ranks) -> Decoder:
    """The decoder of a model folder, of this shape: that of its config, or with another rope.

    XverseError where the folder is quantized.
    """
    checkpoint = load.open_checkpoint(folder)
    if "quantization_config" in checkpoint.config:
        raise quantized_base(folder, "full")
    dtype = dtype_of(options.compute, ranks)
    decoder = load.build(checkpoint, open_weights(folder), dtype, home(options, ranks))
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()  # on a CPU they are the files' own memory
    decoder.shape = decoder.rope.shape = shape
    return prepared(decoder.requires_grad_(True), options, ranks).train()


def adapted(
    shape: ModelShape,
    folder: Path,
    options: Training,
    ranks: Ranks,
    adapter: Lora,
    *,
    integers: str | None = None,
) -> Decoder:
    """The frozen decoder of a model folder with new adapters, which alone learn.

    `integers` names the form that the linear layers of the blocks are rounded to as each is read
    (QLoRA); a folder that is quantized already stays as it is. XverseError where it is and
    `integers` is None, and for products in 8 bits, which adapters have none of.
    """
    if options.compute.fp8:
        raise XverseError(
            "Adapters do not multiply in FP8.",
            "compute.fp8 is for weights that learn themselves.",
            "Leave compute.fp8 out, or take --method full.",
        )
    checkpoint = load.open_checkpoint(folder)
    dtype = dtype_of(options.compute, ranks)
    stored = "quantization_config" in checkpoint.config
    if stored and integers is None:
        raise quantized_base(folder, "lora")
    keep = None if stored or integers is None else _rounding(shape, integers)
    decoder = load.build(checkpoint, open_weights(folder), dtype, home(options, ranks), keep)
    decoder.shape = decoder.rope.shape = shape
    decoder = add_lora(_plain_ends(decoder), adapter, seed=options.seed)
    return prepared(decoder, options, ranks).train()


def frozen(shape: ModelShape, folder: Path, options: Training, ranks: Ranks) -> Decoder:
    """The decoder of a model folder as it is, spread like one to train: what another is held to."""
    return continued(shape, folder, options, ranks).requires_grad_(False).eval()


def quantized_base(folder: Path, method: str) -> XverseError:
    """The error for a quantized folder where weights are needed."""
    return XverseError(
        f"{folder} is quantized, and --method {method} trains on plain weights.",
        "Integers have no gradient.",
        "Take --method qlora, or the unquantized model.",
    )


def _rounding(shape: ModelShape, integers: str) -> load.Keep:
    """What rounds the linear layers of the blocks; head and embedding stay as they are."""
    recipe = Recipe(Recipe.of(integers).fitting(shape).scheme)
    return lambda _shape, name, module: quantize_module(name, module, recipe, search=True)


def _plain_ends(decoder: Decoder) -> Decoder:
    """The decoder with head and embedding as numbers: the loss is computed with the head's."""
    table: object = decoder.model.embed_tokens
    if isinstance(table, QuantizedEmbedding):
        plain = Embedding(0, 0)
        plain.weight = torch.nn.Parameter(table.dequantized(), requires_grad=False)
        decoder.model.embed_tokens = plain
    if isinstance(decoder.lm_head, QuantizedLinear):
        bias = decoder.lm_head.bias
        decoder.lm_head = Linear.of(decoder.lm_head.dequantized(), bias)
    return decoder


def dtype_of(compute: Computing, ranks: Ranks) -> torch.dtype:
    """What is computed in: bf16 on a GPU unless another is asked for, fp32 on a CPU."""
    if compute.dtype == "auto" and ranks.device.type == "cpu":
        return torch.float32
    return pick_dtype(compute.dtype, ranks.device)


def home(options: Training, ranks: Ranks) -> torch.device:
    """Where a decoder's weights are between steps: on the device, or on the host."""
    return torch.device("cpu") if options.compute.offload == "parameters" else ranks.device


def prepared(decoder: Decoder, options: Training, ranks: Ranks) -> Decoder:
    """The decoder with all that is put around it, as the options say."""
    compute, grid = options.compute, grid_of(ranks, options.mesh)
    decoder = spread_tensors(spread_experts(decoder, grid), grid)
    decoder = spread_layers(spread_context(decoder, grid), grid, options.row_tokens)
    if compute.fp8:
        decoder = eight_bits.multiply_in_fp8(decoder, ranks.device)
    if decoder.shape.num_experts and compute.balance:
        decoder = balance.balanced(decoder, grid)
    decoder = recompute(decoder, compute.recompute)
    if compute.compile == "yes" or (compute.compile == "auto" and ranks.device.type == "cuda"):
        decoder = compiled(decoder)
    offload = None
    if compute.offload == "parameters":
        offload = offload_policy(ranks.device, pinned=compute.pin_memory)
    return shard(decoder, grid, reshard=compute.reshard, offload=offload)


def compiled(decoder: Decoder, backend: str | Callable[..., Any] = "inductor") -> Decoder:
    """Blocks compiled by PyTorch when they first run: once, for all of them.

    A block's number is no part of it: training keeps no keys and values to find again, and code
    that is made for one number is made anew for the next, and after eight of them not at all.
    """
    for block in decoder.model.layers:
        cast(Block, block).self_attn.layer = 0
        block.compile(backend=backend)
    return decoder


def recompute(decoder: Decoder, how: str) -> Decoder:
    """Blocks that compute again in the backward pass what they did not keep in the forward pass:
    nothing ("none"), all but products and attention ("selective"), or all ("full")."""
    if how == "none":
        return decoder
    again = _again_but_products if how == "selective" else _again
    for block in decoder.model.layers:
        # A method of this file, which the compiler reads; PyTorch's own it leaves uncompiled.
        block.forward = types.MethodType(again, block)
    return decoder


def _again(block: Block, *inputs: object) -> Tensor:
    found: Tensor = checkpoint(type(block).forward, block, *inputs, use_reentrant=False)
    return found


def _again_but_products(block: Block, *inputs: object) -> Tensor:
    found: Tensor = checkpoint(
        type(block).forward, block, *inputs, use_reentrant=False, context_fn=_selective
    )
    return found


def _selective() -> tuple[ContextManager[Any], ContextManager[Any]]:
    def policy(_context: object, operation: object, *_args: object, **_named: object) -> object:
        if operation in KEPT:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@torch.no_grad()
def _fill(decoder: Decoder, layout: Layout, seed: int, device: torch.device) -> None:
    """New weights, one after another, drawn on the device; a rank takes its part of each."""
    own = dict(decoder.named_parameters())
    generator = torch.Generator(device).manual_seed(seed)
    for name, size in layout.sizes.items():
        here = name in own and own[name].requires_grad
        if name.endswith(("norm.weight", "bias")):
            if here:
                own[name].fill_(float(name.endswith("weight")))
            continue
        whole = torch.empty(size, device=device).normal_(0.0, STD, generator=generator)
        view = layout.view(name, own[name]) if here else None
        if isinstance(view, DTensor):
            mesh, placements = view.device_mesh, view.placements
            part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            view.to_local().copy_(part.to_local())
        elif view is not None:
            view.copy_(whole)
