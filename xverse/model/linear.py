"""D -> N. The linear layer of every block, and its stack for experts."""

from collections.abc import Sequence
from typing import Self

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
    def join(cls, *parts: Self) -> Self:
        """One layer whose outputs are those of the parts, one after another."""
        joined = cls.__new__(cls)
        nn.Module.__init__(joined)
        joined.weight = _frozen([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        joined.bias = _frozen(biases) if biases else None
        return joined

    def forward(self, x_TD: Tensor) -> Tensor:
        return multiply.linear(x_TD, self.weight, self.bias)


class StackedLinear(nn.Module):
    """X linear layers of one size, one for each expert; weight [X, N, D], no bias."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x_TD: Tensor, expert: int) -> Tensor:
        return multiply.linear(x_TD, self.weight[expert])


def _frozen(parts: Sequence[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.data for part in parts]), requires_grad=False)
