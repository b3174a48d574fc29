"""BLOCK -> THE SAME BLOCK, EASIER TO ROUND. Inputs that matter get finer steps.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv 2306.00978: columns that meet large
inputs are multiplied by s before they are rounded, and the inputs divided by it. The division is
folded into whatever computes the inputs, a norm or a linear layer, and costs nothing at run time.
Here s is judged by the second moments of the inputs, with no further pass of the samples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xverse.model.feedforward import Router
from xverse.model.linear import Linear, StackedLinear
from xverse.model.norm import RMSNorm
from xverse.quant.observe import Moments
from xverse.quant.rounding import nearest, worth
from xverse.quant.scheme import Scheme

POWERS = [step / 20 for step in range(20)]  # of the mean input, 0 being no scaling; the paper's
ROWS = 1024  # of each layer, evenly spread, that judge; all of them tell the same


class Fold(NamedTuple):
    """`source` computes the inputs of `targets`; `plain` takes the same ones and is not rounded."""

    source: str
    targets: tuple[str, ...]
    plain: tuple[str, ...] = ()


FOLDS = (
    Fold(
        "input_layernorm",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    Fold(
        "post_attention_layernorm",
        (
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.experts.gate_proj",
            "mlp.experts.up_proj",
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
        ),
        ("mlp.router",),
    ),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
    Fold("mlp.experts.up_proj", ("mlp.experts.down_proj",)),
    Fold("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
)


@torch.no_grad()
def scale_inputs(block: nn.Module, moments: Mapping[str, Moments], scheme: Scheme) -> None:
    """Fold the best scaling found into the block, in place; what it computes stays the same.

    Weights of layers become fp32, so that they are rounded once, by the scheme. `moments` become
    those of the scaled inputs.
    """
    modules = dict(block.named_modules())
    for fold in FOLDS:
        targets = [name for name in fold.targets if name in modules]
        if not targets:
            continue
        source = modules[fold.source]
        first = _weight(modules[targets[0]])
        if not isinstance(source, RMSNorm) and _weight(source).shape[-2] != first.shape[-1]:
            continue  # fewer key/value heads than query heads: one row feeds several columns
        scale_D = _best(modules, targets, moments, scheme)
        scale_D = _divide(source, scale_D)
        for name in (*targets, *(name for name in fold.plain if name in modules)):
            layer = modules[name]
            layer.weight = nn.Parameter(_weight(layer).float() * scale_D, requires_grad=False)
        for owner in {id(moments[name]): moments[name] for name in targets}.values():
            owner.hessian_XDD /= scale_D[:, None] * scale_D


def _best(
    modules: Mapping[str, nn.Module],
    targets: Sequence[str],
    moments: Mapping[str, Moments],
    scheme: Scheme,
) -> Tensor:
    """The scaling [D] with which the outputs of the targets are nearest to what they were."""
    power_D = sum(moments[name].hessian_XDD.diagonal(dim1=1, dim2=2).sum(0) for name in targets)
    assert isinstance(power_D, Tensor), "there are targets"
    size_D = power_D.sqrt()
    size_D = (size_D / size_D.mean().clamp(min=1e-30)).clamp(min=1e-4)
    best, best_D = float("inf"), torch.ones_like(size_D)
    samples = [(_some_rows(_weight(modules[name])), moments[name].hessian_XDD) for name in targets]
    for power in POWERS:
        scale_D = size_D**power
        scale_D = scale_D / (scale_D.amax() * scale_D.amin()).sqrt()
        loss = 0.0
        for weight_XND, hessian_XDD in samples:
            scaled = weight_XND * scale_D
            error_XND = worth(nearest(scaled, scheme), scheme) / scale_D - weight_XND
            loss += float(((error_XND @ hessian_XDD) * error_XND).sum())
        if loss < best:
            best, best_D = loss, scale_D
    return best_D


def _divide(source: nn.Module, scale_D: Tensor) -> Tensor:
    """Divide what `source` computes by the scale; gives what it has really been divided by."""
    weight = _weight(source)
    if isinstance(source, RMSNorm):
        # A norm keeps its dtype, and what that rounds away must not be lost.
        divided = (weight.float() / scale_D).to(weight.dtype)
        there = divided != 0
        source.weight = nn.Parameter(divided, requires_grad=False)
        return torch.where(there, weight.float() / divided.float().where(there, scale_D), scale_D)
    source.weight = nn.Parameter(weight.float() / scale_D[:, None], requires_grad=False)
    if isinstance(source, Linear) and source.bias is not None:
        divided = (source.bias.float() / scale_D).to(source.bias.dtype)
        source.bias = nn.Parameter(divided, requires_grad=False)
    return scale_D


def _some_rows(weight: Tensor) -> Tensor:
    """[X, up to ROWS, D] in fp32 of a layer or a stack."""
    step = -(-weight.shape[-2] // ROWS)
    return weight[..., ::step, :].float().reshape(-1, *weight[..., ::step, :].shape[-2:])


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, Linear | StackedLinear | Router | RMSNorm), type(module)
    return module.weight
