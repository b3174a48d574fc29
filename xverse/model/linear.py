"""D -> N. The linear layer of every block, and its stack for experts."""

import torch
from torch import Tensor, nn

from xverse.kernels import multiply


class Linear(nn.Module):
    """x @ weight.T + bias; weight [N, D]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return multiply.linear(x_TD, self.weight, self.bias)


class StackedLinear(nn.Module):
    """X linear layers of one size, one for each expert; weight [X, N, D], no bias."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x_TD: Tensor, expert: int) -> Tensor:
        return multiply.linear(x_TD, self.weight[expert])
