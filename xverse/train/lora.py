"""LINEAR -> LINEAR + LOW RANK. Adapters beside frozen layers, put on a decoder from outside.

    LoRA    W x + s B A x              (Hu et al. 2021); s = alpha / rank, or alpha / sqrt(rank)
    DoRA    m (W + s B A) x / |W + s B A|   (Liu et al. 2024); |.| is the length of each row

A [R, I] begins random and B [N, R] zero, so that a new adapter changes nothing. Of a stack of
experts they are [X, R, I] and [X, N, R]. W may be quantized: then this is QLoRA.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from xverse.config import nearest
from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear, StackedLinear
from xverse.quant import gradient
from xverse.quant.linear import QuantizedLinear
from xverse.train.tuning import Lora


class Adapted(nn.Module):
    """A frozen layer and its adapter; only `a`, `b` and (DoRA) `magnitude` learn."""

    def __init__(
        self, base: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout, self.on = scale, dropout, True
        self.magnitude: nn.Parameter | None = None

    def stretch(self, magnitude: Tensor) -> None:
        """Make it a DoRA adapter with these lengths of the rows, [N] or [X, N]."""
        self.magnitude = nn.Parameter(magnitude)

    def forward(self, x_TD: Tensor, expert: int | None = None) -> Tensor:
        """The layer's product, of a stack by the layer of that expert, and the adapter's."""
        y_TN: Tensor = self.base(x_TD) if expert is None else self.base(x_TD, expert)
        if not self.on:
            return y_TN
        a_RD, b_NR = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        if self.dropout:  # with a share of 0, PyTorch would still write a mask
            x_TD = functional.dropout(x_TD, self.dropout, self.training)
        low_TR = functional.linear(x_TD, a_RD) * self.scale
        if self.magnitude is None:
            return torch.addmm(y_TN, low_TR, b_NR.T)  # one pass over y, which is the wide one
        more_TN = functional.linear(low_TR, b_NR)
        magnitude_N = self.magnitude if expert is None else self.magnitude[expert]
        # The length is a constant to the gradient: section 4.3 of the paper, half the memory.
        share_N = magnitude_N / row_lengths(self, expert).to(magnitude_N.dtype)
        bias = getattr(self.base, "bias", None)
        if bias is not None:
            return (y_TN - bias + more_TN) * share_N + bias
        return (y_TN + more_TN) * share_N


def add_lora(decoder: Decoder, options: Lora, *, seed: int = 0) -> Decoder:
    """The decoder, frozen, with new adapters that learn; the same ones for a seed everywhere.

    Raises XverseError for a target that no block has.
    """
    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in targets(decoder, options.targets):
        *experts, outputs, inputs = size_of(layer)
        a = torch.empty(*experts, options.rank, inputs)
        # PyTorch's own beginning of a linear layer, which PEFT has too.
        a.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
        b = torch.zeros(*experts, outputs, options.rank)
        put_on(decoder, name, a, b, options.scale, dropout=options.dropout)
        if options.dora:
            made = decoder.get_submodule(name)
            assert isinstance(made, Adapted), "it was put there"
            chosen: list[int | None] = [*range(experts[0])] if experts else [None]
            lengths = torch.stack([row_lengths(made, expert) for expert in chosen])
            made.stretch((lengths if experts else lengths[0]).to(decoder.dtype))
    return decoder


def put_on(
    decoder: Decoder, name: str, a: Tensor, b: Tensor, scale: float, *, dropout: float = 0.0
) -> None:
    """Put an adapter of these numbers on the layer `name`, in the decoder's dtype."""
    layer = decoder.get_submodule(name)
    place, dtype = decoder.device, decoder.dtype
    made = Adapted(layer, a.to(place, dtype), b.to(place, dtype), scale, dropout)
    decoder.set_submodule(name, made.train(decoder.training))


def targets(decoder: Decoder, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """The layers of the blocks whose names end with one of `names`."""
    found: dict[str, list[tuple[str, nn.Module]]] = {name: [] for name in names}
    known: set[str] = set()
    for path, module in decoder.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, Linear | StackedLinear | QuantizedLinear):
            last = path.rsplit(".", 1)[-1]
            known.add(last)
            if last in found:
                found[last].append((path, module))
    for name, layers in found.items():
        if not layers:
            raise XverseError(
                f"No block has a linear layer {name!r:.60}.{nearest(name, known)}",
                f"The layers that can have an adapter are {', '.join(sorted(known))}.",
                "Correct lora.targets.",
            )
    return [layer for layers in found.values() for layer in layers]


def adapters(decoder: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a decoder, by their names."""
    return {n: module for n, module in decoder.named_modules() if isinstance(module, Adapted)}


@contextmanager
def switched_off(decoder: Decoder) -> Iterator[Decoder]:
    """The decoder as it was before the adapters, for as long as this lasts."""
    layers = adapters(decoder).values()
    for layer in layers:
        layer.on = False
    try:
        yield decoder
    finally:
        for layer in layers:
            layer.on = True


@torch.no_grad()
def merge_adapters(decoder: Decoder) -> Decoder:
    """The decoder with every adapter taken into its layer: plain layers again, frozen.

    Raises XverseError where a layer is quantized: its steps are too coarse to take one in.
    """
    for name, layer in adapters(decoder).items():
        base = layer.base
        if not isinstance(base, Linear | StackedLinear):
            raise XverseError(
                f"The adapter of {name} cannot be taken in.",
                "The layer is quantized, and rounding it again would lose what was learned.",
                "Merge it into the unquantized model: xverse export MODEL --to merged.",
            )
        weight = base.weight.float() + layer.b.float() @ layer.a.float() * layer.scale
        if layer.magnitude is not None:
            weight *= (layer.magnitude.float() / weight.norm(dim=-1))[..., None]
        base.weight.data = weight.to(base.weight.dtype)
        decoder.set_submodule(name, base)
    return decoder


@torch.no_grad()
def row_lengths(layer: Adapted, expert: int | None) -> Tensor:
    """|W + s B A| of each row, [N] in fp32, some rows at a time."""
    a_RD = (layer.a if expert is None else layer.a[expert]).float()
    b_NR = (layer.b if expert is None else layer.b[expert]).float()
    base = layer.base
    if not isinstance(base, QuantizedLinear):
        weight = cast(Tensor, base.weight if expert is None else cast(Tensor, base.weight)[expert])
        return torch.addmm(weight.float(), b_NR, a_RD, alpha=layer.scale).norm(dim=-1)
    order = base.order_of(expert)
    if order is not None:
        a_RD = a_RD[:, order]
    parts = [
        torch.addmm(weight_ND.float(), b_NR[rows], a_RD, alpha=layer.scale).norm(dim=-1)
        for rows, weight_ND in gradient.rows_of(base, expert)
    ]
    return torch.cat(parts)


def size_of(layer: nn.Module) -> tuple[int, ...]:
    """(N, D) of a linear layer, (X, N, D) of a stack; quantized or not."""
    weight = cast(Tensor, layer.weight)
    inputs = layer.inputs if isinstance(layer, QuantizedLinear) else weight.shape[-1]
    return (*weight.shape[:-1], inputs)
