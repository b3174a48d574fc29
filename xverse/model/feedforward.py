"""D -> D. SwiGLU, and the mixture of SwiGLU experts."""

import torch
from torch import Tensor, nn

from xverse.kernels.reference import route, swiglu
from xverse.model.linear import Linear, StackedLinear
from xverse.model.shape import ModelShape


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) of the given width."""

    def __init__(self, hidden: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj: nn.Module = Linear(width, hidden, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Experts(nn.Module):
    """All routed experts of a layer, stacked: expert number first."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = StackedLinear(experts, hidden, width)
        self.up_proj = StackedLinear(experts, hidden, width)
        self.down_proj = StackedLinear(experts, width, hidden)

    def forward(self, x_TD: Tensor, expert: int) -> Tensor:
        gated = swiglu(self.gate_proj(x_TD, expert), self.up_proj(x_TD, expert))
        return self.down_proj(gated, expert)


class MixtureOfExperts(nn.Module):
    """The best `moe_top_k` experts of each token by weight, plus a shared SwiGLU for all.

    No token is ever dropped, the shared part is not gated, and the router stays in fp32.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, width = shape.hidden_size, shape.intermediate_size
        self.top_k = shape.moe_top_k
        self.router = Linear(hidden, shape.num_experts)
        self.experts = Experts(shape.num_experts, hidden, width)
        self.shared_experts: nn.Module | None = (
            FeedForward(hidden, width * shape.num_shared_experts)
            if shape.num_shared_experts
            else None
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, experts = route(x_TD, self.router.weight, self.top_k)
        mixed = torch.zeros_like(x_TD)
        for expert in experts.unique().tolist():
            tokens, choice = (experts == expert).nonzero(as_tuple=True)
            share = weights[tokens, choice, None]
            mixed.index_add_(0, tokens, self.experts(x_TD[tokens], expert) * share)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(x_TD)
        return mixed
