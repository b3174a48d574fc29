"""D -> D. Root mean square normalization."""

import torch
from torch import Tensor, nn

from xverse.kernels import normalize
from xverse.kernels.reference import Norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the rounding of the model's own code."""

    def __init__(self, size: int, eps: float, *, weight_in_fp32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.weight_in_fp32 = weight_in_fp32

    @property
    def spec(self) -> Norm:
        """As an operation that applies it on the way takes it."""
        return Norm(self.weight, self.eps, self.weight_in_fp32)

    def forward(self, x_TD: Tensor) -> Tensor:
        return normalize.rms_norm(x_TD, self.weight, self.eps, weight_in_fp32=self.weight_in_fp32)
