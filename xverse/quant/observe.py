"""BLOCK, SAMPLES -> WHAT ITS LAYERS ARE FED. Second moments of the inputs, while samples pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xverse.model.linear import Linear, StackedLinear

# Layers of a block that take the same input as another, whose sums serve them, too.
SHARED = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.experts.up_proj": "mlp.experts.gate_proj",
    "mlp.shared_experts.up_proj": "mlp.shared_experts.gate_proj",
}


@dataclass
class Moments:
    """Sums over the inputs x of a layer or, with X above 1, of each layer of a stack."""

    hessian_XDD: Tensor  # of x.T @ x, fp32
    tokens_X: Tensor  # how many inputs there were, int64

    @classmethod
    def none(cls, layers: int, inputs: int, device: torch.device) -> "Moments":
        """Before the first input."""
        hessian_XDD = torch.zeros(layers, inputs, inputs, device=device)
        return cls(hessian_XDD, torch.zeros(layers, dtype=torch.int64, device=device))

    def add(self, layer: int, x_TD: Tensor) -> None:
        """Count inputs of one layer."""
        hessian_DD = self.hessian_XDD[layer]
        if x_TD.is_cuda and x_TD.dtype in (torch.bfloat16, torch.float16):
            # Products of 16-bit numbers are exact in fp32: all of a 7B model's in 5 s, not 60.
            hessian_DD += torch.mm(x_TD.T, x_TD, out_dtype=torch.float32)
        else:
            x_TD = x_TD.float()
            hessian_DD.addmm_(x_TD.T, x_TD)
        self.tokens_X[layer] += len(x_TD)

    def mean(self) -> Tensor:
        """The mean of x.T @ x of each layer; zero where there was no input."""
        return self.hessian_XDD / self.tokens_X.clamp(min=1)[:, None, None]


class Observed(nn.Module):
    """A linear layer or a stack that adds up what it is fed."""

    def __init__(self, layer: Linear | StackedLinear, moments: Moments) -> None:
        super().__init__()
        self.layer, self.moments = layer, moments

    def forward(self, x_TD: Tensor, *expert: int) -> Tensor:
        self.moments.add(expert[0] if expert else 0, x_TD)
        return self.layer(x_TD, *expert)


@contextmanager
def observed(block: nn.Module) -> Iterator[dict[str, Moments]]:
    """While it lasts, every sample that passes the block counts; gives the sums by the name that
    the layer has in the block. Layers of one input have one sum between them."""
    layers = linears(block)
    moments: dict[str, Moments] = {}
    try:
        for name, layer in layers.items():
            if name not in SHARED:
                weight = layer.weight
                count = len(weight) if weight.dim() == 3 else 1
                moments[name] = Moments.none(count, weight.shape[-1], weight.device)
                block.set_submodule(name, Observed(layer, moments[name]))
        yield moments
    finally:
        for name, layer in layers.items():
            block.set_submodule(name, layer)
    for name, owner in SHARED.items():
        if name in layers:
            moments[name] = moments[owner]


def linears(block: nn.Module) -> dict[str, Linear | StackedLinear]:
    """The layers of a block that quantization is for, by name: all linear ones but the router."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, Linear | StackedLinear) and not name.endswith("router")
    }
