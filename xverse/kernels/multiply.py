"""X, W -> X @ W.T. Matrix products, by the operator that is fastest for the shape at hand."""

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels import native

ROWS = 16  # rows up to which a product is a matter of memory, and not of arithmetic
COMPILED_ROWS = 128  # from which on fp32 products are faster than ours, widening included
WIDENED = 2**20  # weights at a time: 4 MiB, which stay in the cache


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [T, D] x [N, D] -> [T, N]; sums in fp32. Twin: `functional.linear`.

    On a CPU, few rows of bf16 go other ways, where a row's result does not depend on what stands
    beside it, and so a prompt gets alone the very logits that it gets in a batch. Up to ROWS rows
    are multiplied from the other side, weight @ x.T, which reads weights 1.3 to 1.8 times as fast
    (docs/notebook.md), filled up to ROWS with zeros. A CPU without arithmetic of bf16 has the
    compiled product, 2 to 5 times as fast as the general operator there, and more than
    COMPILED_ROWS rows are widened.
    """
    rows = x_TD.shape[0]
    if (
        weight_ND.dtype != torch.bfloat16
        or weight_ND.device.type != "cpu"
        or torch.is_grad_enabled()
    ):
        return functional.linear(x_TD, weight_ND, bias_N)
    if not native.bf16_in_hardware() and not native.why_not():
        return (_widened if rows > COMPILED_ROWS else _compiled)(x_TD, weight_ND, bias_N)
    if rows > ROWS:
        return functional.linear(x_TD, weight_ND, bias_N)
    padded = functional.pad(x_TD, (0, 0, 0, ROWS - rows))
    y_TN = torch.mm(weight_ND, padded.T).T[:rows].contiguous()
    return y_TN if bias_N is None else y_TN + bias_N


def _widened(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `linear`, in fp32, some outputs after others."""
    wide_TD = x_TD.float()
    y_TN = x_TD.new_empty(*x_TD.shape[:-1], len(weight_ND))
    at_once = max(1, WIDENED // weight_ND.shape[1])
    for some_TN, part_ND in zip(y_TN.split(at_once, -1), weight_ND.split(at_once), strict=True):
        some_TN.copy_(functional.linear(wide_TD, part_ND.float()))
    return y_TN if bias_N is None else y_TN + bias_N


def _compiled(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `linear`, by rows_cpu.c."""
    outputs, inputs = weight_ND.shape
    x_TD, weight_ND = x_TD.contiguous(), weight_ND.contiguous()
    assert x_TD.dtype == torch.bfloat16, "weights and inputs are of one dtype"
    assert x_TD.shape[-1] == inputs, "inputs fit"
    bias = None if bias_N is None else bias_N.contiguous()
    y_TN = x_TD.new_empty(*x_TD.shape[:-1], outputs)
    failed = native.loaded().multiply_rows(
        weight_ND.data_ptr(),
        x_TD.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y_TN.data_ptr(),
        x_TD.numel() // inputs,
        outputs,
        inputs,
        torch.get_num_threads(),
    )
    if failed:
        raise native.no_memory(f"{x_TD.numel() // inputs} rows of {inputs} numbers did not fit.")
    return y_TN
