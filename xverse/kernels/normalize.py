"""D -> D. RMSNorm by PyTorch's own operator, rounded as the model's own code does."""

from torch import Tensor
from torch.nn import functional


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, weight_in_fp32: bool) -> Tensor:
    """RMSNorm. Twin: `reference.rms_norm`, bit for bit in bf16.

    The operator computes in fp32 and rounds once at its end: with the weight inside as the dense
    XVERSE code does, with the weight multiplied afterwards as Llama's.
    """
    if weight_in_fp32:
        return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    return weight_D * functional.rms_norm(x_TD, weight_D.shape, None, eps)
