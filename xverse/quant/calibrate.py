"""BLOCK, SAMPLES -> QUANTIZED BLOCK. One block rounded so that samples come out as they did."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.log import logger
from xverse.model.linear import Linear, StackedLinear
from xverse.quant.awq import scale_inputs
from xverse.quant.gptq import importance, solve
from xverse.quant.linear import QuantizedLinear
from xverse.quant.observe import Moments, linears, observed
from xverse.quant.passage import Passage
from xverse.quant.rounding import Rounded, nearest, searched, worth
from xverse.quant.scheme import Scheme

Method = Literal["auto", "rtn", "search", "gptq", "awq"]
CALIBRATED = ("gptq", "awq")  # the methods that look at samples


def choose_method(method: Method, scheme: Scheme, *, samples: bool) -> Method:
    """What "auto" means for a scheme: GPTQ where there are samples, else a search of scales for
    groups, and plain rounding for fp8 and for the published rows. XverseError for what cannot be.
    """
    if method in CALIBRATED and not samples:
        raise XverseError(
            f"{method} rounds by what samples of text do in the model, and there are none.",
            "It weighs errors by the inputs that a layer meets.",
            'Give samples, or take the method "search", which needs none.',
        )
    if method in ("gptq", "awq", "search") and scheme.kind == "float":
        raise XverseError(
            f"{method} is not done for fp8.",
            "Its steps grow with the numbers, so that there is little to be gained.",
            'Leave the method out, or take "int8".',
        )
    if method != "auto":
        return method
    if scheme.kind == "float":
        return "rtn"
    if samples:
        return "gptq"
    return "rtn" if scheme.group_size is None else "search"


@torch.no_grad()
def quantize_block(
    block: nn.Module, scheme: Scheme, method: Method, passage: Passage | None = None
) -> dict[str, float]:
    """Round the linear layers of a block in place, and take the samples through it.

    Gives the relative error (root mean square) of each layer: of its outputs where samples have
    shown its inputs, else of its weights.
    """
    moments: Mapping[str, Moments] = {}
    dtype = next(block.parameters()).dtype
    if passage is not None and method in CALIBRATED:
        with observed(block) as moments:
            passage.pass_by(block)
        if method == "awq":
            scale_inputs(block, moments, scheme)
    errors = _round(block, scheme, method, moments, dtype)
    if passage is not None:
        passage.advance(block)
    return errors


def _round(
    block: nn.Module,
    scheme: Scheme,
    method: Method,
    moments: Mapping[str, Moments],
    dtype: torch.dtype,
) -> dict[str, float]:
    errors, layers = {}, linears(block)
    for names, seen in _sharing(layers, moments):
        weights = [_stack(layers[name]) for name in names]
        joined = _rounded(names[0], torch.cat(weights, dim=1), scheme, method, seen, dtype)
        parts = _split(joined, [weight.shape[1] for weight in weights])
        for name, weight_XND, part in zip(names, weights, parts, strict=True):
            errors[name] = relative_error(weight_XND, part, scheme, seen)
            own = part if layers[name].weight.dim() == 3 else _only(part)
            quantized = QuantizedLinear.of_rounded(layers[name], own, scheme)
            block.set_submodule(name, quantized)
    return errors


def _sharing(
    layers: Iterable[str], moments: Mapping[str, Moments]
) -> list[tuple[list[str], Moments | None]]:
    """Names of layers that take one input, which are rounded as one matrix; or each alone."""
    if not moments:
        return [([name], None) for name in layers]
    groups: dict[int, list[str]] = {}
    for name in layers:
        groups.setdefault(id(moments[name]), []).append(name)
    return [(names, moments[names[0]]) for names in groups.values()]


def _rounded(
    name: str,
    weight_XND: Tensor,
    scheme: Scheme,
    method: Method,
    seen: Moments | None,
    dtype: torch.dtype,
) -> Rounded:
    if method == "rtn":
        return nearest(weight_XND, scheme, dtype)
    if seen is None:
        return searched(weight_XND, scheme, None, dtype)
    hessian_XDD = seen.mean()
    if method == "awq":
        return searched(weight_XND, scheme, importance(hessian_XDD), dtype)
    rounded = solve(weight_XND, hessian_XDD, scheme, dtype)
    few = (seen.tokens_X < weight_XND.shape[-1]).nonzero()[:, 0].tolist()
    if few:
        logger.warning(
            "%s: %d of %d saw fewer samples than they have inputs (%d); these are rounded with a "
            "search of scales alone. More samples would calibrate them",
            name,
            len(few),
            len(weight_XND),
            weight_XND.shape[-1],
        )
        alone = searched(weight_XND[few], scheme, None, dtype)
        for whole, part in zip(rounded, alone, strict=True):
            if whole is not None and part is not None:
                whole[few] = part
    return rounded


def relative_error(
    weight_XND: Tensor, rounded: Rounded, scheme: Scheme, seen: Moments | None = None
) -> float:
    """Root mean square of the error over that of what it should be: outputs, else weights."""
    weight = weight_XND.float()
    error = worth(rounded, scheme) - weight
    if seen is None:
        return float((error.square().sum() / weight.square().sum().clamp(min=1e-30)).sqrt())
    lost, had = (((x @ seen.hessian_XDD) * x).sum() for x in (error, weight))
    return float((lost.clamp(min=0) / had.clamp(min=1e-30)).sqrt())


def _stack(layer: Linear | StackedLinear) -> Tensor:
    weight = layer.weight.detach()
    return weight if weight.dim() == 3 else weight[None]


def _split(rounded: Rounded, rows: list[int]) -> Iterator[Rounded]:
    """Stacks of so many rows each, in memory of their own."""
    steps, scales = rounded.steps.split(rows, dim=1), rounded.scale.split(rows, dim=1)
    zeros = [None] * len(rows) if rounded.zero is None else rounded.zero.split(rows, dim=1)
    for step, scale, zero in zip(steps, scales, zeros, strict=True):
        own = None if zero is None else zero.contiguous()
        yield Rounded(step.contiguous(), scale.contiguous(), own)


def _only(rounded: Rounded) -> Rounded:
    """The first of a stack."""
    steps, scale, zero = rounded
    return Rounded(steps[0], scale[0], None if zero is None else zero[0])
