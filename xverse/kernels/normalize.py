"""D -> D. RMSNorm by the fastest operator that rounds as the model's own code does."""

from torch import Tensor
from torch.nn import functional

from xverse.kernels import reference


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, weight_in_fp32: bool) -> Tensor:
    """RMSNorm. Twin: `reference.rms_norm`.

    PyTorch's own operator keeps everything in fp32 up to the end, which is bit for bit what the
    dense XVERSE code does; Llama's order of rounding has no operator of its own.
    """
    if weight_in_fp32:
        return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps)
    return reference.rms_norm(x_TD, weight_D, eps, weight_in_fp32=False)
