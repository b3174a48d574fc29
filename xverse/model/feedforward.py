"""D -> D. SwiGLU, and the mixture of SwiGLU experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from xverse.kernels import dispatch
from xverse.kernels.reference import route, swiglu
from xverse.kernels.reference_experts import Stacks
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

    def stacks(self) -> Stacks:
        """The weights of all experts, where they are not quantized."""
        return Stacks(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)

    def one_by_one(self, x_TD: Tensor) -> str:
        """Why the experts can only be called one by one; empty where their stacks will do."""
        for stack in (self.gate_proj, self.up_proj, self.down_proj):
            if type(stack) is not StackedLinear:
                return "the experts are not plain weights: quantized, say"
        if torch.is_grad_enabled() and (x_TD.requires_grad or self.gate_proj.weight.requires_grad):
            return "gradients are wanted, and the kernels have none"
        return ""


class Router(nn.Module):
    """Which experts a token goes to, and how much each counts; weight [X, D]."""

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.top_k = top_k

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return route(x_TD, self.weight, self.top_k)

    def scores(self, x_TD: Tensor) -> Tensor:
        """What the choice is made by: softmax over all experts, [T, X] in fp32."""
        return functional.linear(x_TD.float(), self.weight.float()).softmax(-1)


class MixtureOfExperts(nn.Module):
    """The best `moe_top_k` experts of each token by weight, plus a shared SwiGLU for all.

    No token is ever dropped, the shared part is not gated, and the router stays in fp32.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, width = shape.hidden_size, shape.intermediate_size
        self.top_k = shape.moe_top_k
        self.router = Router(hidden, shape.num_experts, shape.moe_top_k)
        self.experts = Experts(shape.num_experts, hidden, width)
        self.shared_experts: nn.Module | None = (
            FeedForward(hidden, width * shape.num_shared_experts)
            if shape.num_shared_experts
            else None
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, experts = self.router(x_TD)
        why_not = self.experts.one_by_one(x_TD)
        mix = dispatch.mix_experts(x_TD.device, x_TD.dtype, why_not).call
        mixed = mix(x_TD, weights, experts, self.experts)
        if self.shared_experts is not None:
            mixed = mixed + self.shared_experts(x_TD)
        return mixed
