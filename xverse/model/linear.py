"""D -> N. The linear layer of every block, and its stack for experts."""

from typing import Self, cast

import torch
from torch import Tensor, nn

from xverse.kernels import multiply


class Linear(nn.Module):
    """x @ weight.T + bias; weight [N, D]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """The layer of these frozen numbers."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return made

    def alike(self, other: nn.Module) -> bool:
        """Whether `join` can make one layer of the two."""
        return type(other) is type(self) and (self.bias is None) == (other.bias is None)

    @classmethod
    def join(cls, *parts: Self) -> Self:
        """One layer whose outputs are those of the parts, one after another."""
        biases = [part.bias.data for part in parts if part.bias is not None]
        return cls.of(
            torch.cat([part.weight.data for part in parts]), torch.cat(biases) if biases else None
        )

    def keep_outputs(self, first: int, last: int, of: int) -> Self:
        """The layer of units first..last alone, of `of` equal ones that its outputs are made of.
        A view of these weights."""
        kept = span(self.weight.shape[0], first, last, of)
        bias = None if self.bias is None else self.bias.data[kept]
        return self.of(self.weight.data[kept], bias)

    def keep_inputs(self, first: int, last: int, of: int) -> Self:
        """What units first..last of the inputs add to every output; the bias goes with the first.
        A view of these weights."""
        kept = span(self.weight.shape[1], first, last, of)
        bias = None if self.bias is None or first else self.bias.data
        return self.of(self.weight.data[:, kept], bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return multiply.linear(x_TD, self.weight, self.bias)


class SideBySide(nn.Module):
    """Layers of the same inputs that differ in kind: their outputs, one after another."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.cat([part(x_TD) for part in self.parts], dim=-1)


def join(*layers: Linear) -> Linear:
    """One layer whose outputs are those of all, one after another; one product where it can be.

    They may be of other kinds that stand in the place of a `Linear`, and then so is what they make.
    """
    first, *others = layers
    if all(first.alike(other) for other in others):
        return first.join(*layers)
    return cast(Linear, SideBySide(*layers))


class StackedLinear(nn.Module):
    """X linear layers of one size, one for each expert; weight [X, N, D], no bias."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """The stack of these frozen numbers."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made

    def keep_outputs(self, first: int, last: int, of: int) -> Self:
        """As `Linear.keep_outputs`, of every expert."""
        return self.of(self.weight.data[:, span(self.weight.shape[1], first, last, of)])

    def keep_inputs(self, first: int, last: int, of: int) -> Self:
        """As `Linear.keep_inputs`, of every expert."""
        return self.of(self.weight.data[:, :, span(self.weight.shape[2], first, last, of)])

    def forward(self, x_TD: Tensor, expert: int) -> Tensor:
        return multiply.linear(x_TD, self.weight[expert])


def span(size: int, first: int, last: int, of: int) -> slice:
    """Where units first..last are, of the `of` equal ones that `size` elements are made of."""
    assert size % of == 0, f"{size} elements are not {of} equal units"
    return slice(first * (size // of), last * (size // of))
