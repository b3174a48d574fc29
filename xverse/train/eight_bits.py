"""LINEAR -> 8-BIT PRODUCTS. FP8 for the linear layers of the blocks; their weights stay as is."""

import torch
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.kernels.multiply_fp8 import linear_fp8
from xverse.log import warn_once
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear

HARDWARE = (8, 9)  # compute capability with products of e4m3 and e5m2


class Fp8Linear(nn.Module):
    """x @ weight.T + bias, forward and backward in FP8 with one scale a tensor."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TN = linear_fp8(x_TD, self.weight)
        return y_TN if self.bias is None else y_TN + self.bias


def multiply_in_fp8(decoder: Decoder, device: torch.device) -> Decoder:
    """The decoder with the linear layers of its blocks multiplying in 8 bits.

    On a CPU this is an emulation, to try what it costs in loss. Experts stay as they are: their
    products are too small to gain. XverseError for a GPU without such products, and for sizes that
    are no multiple of 16, which they need.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < HARDWARE:
        raise XverseError(
            "This GPU has no products in 8 bits.",
            f"Its compute capability is below {HARDWARE}.",
            "Leave compute.fp8 out.",
        )
    if device.type != "cuda":
        warn_once("fp8 is emulated on a CPU: the losses are those of a GPU, the speed is not")
    for block in decoder.model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    _require_sixteens(name, child)
                    setattr(parent, name, Fp8Linear(child))
    return decoder


def _require_sixteens(name: str, layer: Linear) -> None:
    if any(size % 16 for size in layer.weight.shape):
        raise XverseError(
            f"{name} cannot multiply in 8 bits.",
            f"It is {list(layer.weight.shape)}, and both must be multiples of 16.",
            "Leave compute.fp8 out, or take another shape.",
        )
