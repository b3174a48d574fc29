"""X, INTEGERS -> X @ W.T. Products on a CPU with weights of 4 and 8 bits, repacked once.

The layout is that of `multiply_cpu.c`, which computes; see there. Twin:
`reference_packed.multiply_packed`.
"""

import ctypes
from math import gcd

import torch
from torch import Tensor, nn

from xverse.kernels import native
from xverse.kernels.reference import Norm

BLOCK = 32  # outputs whose weights stand together
GROUP = 128  # inputs that share a scale at most: those of x have one of their own each


def group_of(inputs: int, group: int | None) -> int:
    """Inputs that share a scale in the packed form; below 8 there is none."""
    return gcd(inputs, GROUP, group or inputs)


class PackedWeights(nn.Module):
    """w = (steps - zero) * scale as the compiled product reads it; no part of `state_dict`."""

    def __init__(
        self,
        steps_ND: Tensor,
        scale_NG: Tensor,
        zero_NG: Tensor | None,
        bias_N: Tensor | None,
        *,
        bits: int,
        norm: Norm | None = None,
        gated: bool = False,
    ) -> None:
        """Steps and zeros int8. `norm` is applied to x first; `gated`: the outputs are gates, then
        as many ups, and come out as silu(gate) * up."""
        super().__init__()
        outputs, inputs = steps_ND.shape
        self.bits, self.gated, self.inputs = bits, gated, inputs
        self.outputs = outputs // 2 if gated else outputs
        self.group = group_of(inputs, inputs // scale_NG.shape[1])
        assert self.group % 8 == 0, "`group_of` has been asked"
        times = inputs // self.group // scale_NG.shape[1]
        shift = 2 ** (bits - 1)  # steps are kept unsigned
        scale = self._in_blocks(scale_NG.float()).repeat_interleave(times, dim=1)
        weight = _steps_in_blocks(self._ordered(steps_ND), bits, shift)
        zero = None
        if zero_NG is not None:
            zero = self._in_blocks((zero_NG.to(torch.int16) + shift).to(torch.uint8))
            zero = zero.repeat_interleave(times, dim=1).contiguous()
        bias = None if bias_N is None else self._in_blocks(bias_N.float()[:, None]).contiguous()
        norm_weight = None if norm is None else norm.weight_D.detach().float().contiguous()
        self.norm = norm
        held = {
            "weight": weight,
            "scale": scale.contiguous(),
            "zero": zero,
            "bias": bias,
            "norm_weight": norm_weight,
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)
        self._product: native.Product | None = None

    def _ordered(self, of_N: Tensor) -> Tensor:
        """Rows as the blocks have them, filled up with zeros; of gated ones 16 gates, 16 ups."""
        if not self.gated:
            fill = -len(of_N) % BLOCK
            return torch.cat((of_N, of_N.new_zeros(fill, *of_N.shape[1:])))
        halves = of_N.unflatten(0, (2, -1))
        fill = -halves.shape[1] % (BLOCK // 2)
        halves = torch.cat((halves, halves.new_zeros(2, fill, *halves.shape[2:])), dim=1)
        return halves.unflatten(1, (-1, BLOCK // 2)).transpose(0, 1).flatten(0, 2)

    def _in_blocks(self, of_NG: Tensor) -> Tensor:
        return self._ordered(of_NG).unflatten(0, (-1, BLOCK)).transpose(1, 2)

    def multiply(self, x_TD: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """x @ w.T + bias with its surroundings, [..., D] -> [..., N], in x's dtype."""
        if x_TD.dtype not in native.FLOATS:  # fp16: a CPU has no arithmetic for it either
            wide = None if residual_TN is None else residual_TN.float()
            return self.multiply(x_TD.float(), wide).to(x_TD.dtype)
        x_TD = x_TD.contiguous()
        assert x_TD.shape[-1] == self.inputs, "inputs fit"
        y_TN = x_TD.new_empty(*x_TD.shape[:-1], self.outputs)
        rest: int | None = None
        if residual_TN is not None:
            residual_TN = residual_TN.contiguous()
            assert (residual_TN.shape, residual_TN.dtype) == (y_TN.shape, y_TN.dtype)
            rest = residual_TN.data_ptr()
        failed = native.loaded().multiply(
            ctypes.byref(self.described()),
            x_TD.data_ptr(),
            rest,
            y_TN.data_ptr(),
            x_TD.numel() // self.inputs,
            native.FLOATS[x_TD.dtype],
            torch.get_num_threads(),
        )
        if failed:
            rows = x_TD.numel() // self.inputs
            raise native.no_memory(f"The integers of {rows} rows did not fit.")
        return y_TN

    def rows_of(self, ids_T: Tensor) -> Tensor:
        """Rows of w, [..., D] in fp32: what an embedding looks up."""
        assert not self.gated, "rows stand in their order"
        block, row = ids_T // BLOCK, ids_T % BLOCK
        if self.bits == 4:
            pairs = self.weight[block, :, row]
            steps = torch.stack((pairs & 15, pairs >> 4), dim=-2)
        else:
            steps = self.weight[block, :, :, row]
        zero: Tensor | float = 2.0 ** (self.bits - 1)
        if self.zero is not None:
            zero = self.zero[block, :, row].float()[..., None]
        groups = steps.flatten(-3).unflatten(-1, (-1, self.group)).float()
        return ((groups - zero) * self.scale[block, :, row][..., None]).flatten(-2)

    def described(self) -> native.Product:
        """What the compiled functions are told; it points into this module's memory."""
        made = self._product
        if made is None or made.weight != self.weight.data_ptr():
            assert self.scale.dtype == torch.float32, "packed weights are not cast"
            eps, kind = 0.0, 0
            if self.norm is not None:
                eps, kind = self.norm.eps, 1 if self.norm.weight_in_fp32 else 2
            tensors = (self.weight, self.scale, self.zero, self.bias, self.norm_weight)
            pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
            numbers = (self.outputs, self.inputs, self.group, self.bits, int(self.gated))
            made = self._product = native.Product(*pointers, eps, kind, *numbers)
        return made

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None


def _steps_in_blocks(steps_ND: Tensor, bits: int, shift: int) -> Tensor:
    """int8 [N, D] -> uint8: [blocks, D/8, 2, 32, 4] of 8 bits, [blocks, D/8, 32, 4] of 4 bits, the
    second four inputs in the high halves."""
    unsigned = (steps_ND.to(torch.int16) + shift).to(torch.uint8)
    blocks = unsigned.view(-1, BLOCK, steps_ND.shape[1] // 8, 2, 4).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return blocks.contiguous()
    return (blocks[:, :, 0] | blocks[:, :, 1] << 4).contiguous()
