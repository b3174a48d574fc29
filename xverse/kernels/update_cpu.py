"""GRADIENTS -> WEIGHTS ON A CPU. AdamW compiled, in one pass; else as the reference, in pieces."""

import ctypes

import torch
from torch import Tensor

from xverse.kernels import native, reference_train
from xverse.kernels.reference_train import AdamW

PIECE = 2**18  # numbers at a time: what the reference makes on the way, 1 MiB each, stays in caches


def adamw_in_pieces(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rule: AdamW,
    copy: Tensor | None = None,
) -> None:
    """`reference_train.adamw` without temporaries as large as the weight. All are contiguous."""
    flat = [part.view(-1) for part in (weight, gradient.contiguous(), first, second)]
    copies = None if copy is None else copy.view(-1)
    for begin in range(0, weight.numel(), PIECE):
        here = slice(begin, begin + PIECE)
        placed = rule._replace(start=rule.start + begin)
        copy_ = None if copies is None else copies[here]
        reference_train.adamw(*(part[here] for part in flat), placed, copy_)


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rule: AdamW,
    copy: Tensor | None = None,
) -> None:
    """Twin: `reference_train.adamw`, compiled. All contiguous, each in one of `native.FLOATS`, the
    moments in the same; a copy is bf16 beside a weight in fp32."""
    gradient = gradient.contiguous()
    parts = (weight, gradient, first, second, weight if copy is None else copy)
    assert all(part.is_contiguous() and part.numel() == weight.numel() for part in parts)
    assert first.dtype == second.dtype, "the moments are in one dtype"
    if copy is not None:
        assert (weight.dtype, copy.dtype) == (torch.float32, torch.bfloat16), "as in the docstring"
    about = native.Update(
        weight=weight.data_ptr(),
        first=first.data_ptr(),
        second=second.data_ptr(),
        gradient=gradient.data_ptr(),
        copy=None if copy is None else copy.data_ptr(),
        scale=rule.scale,
        share1=1 - rule.beta1,
        keep2=rule.beta2,
        share2=1 - rule.beta2,
        bias2=1 - rule.beta2**rule.step,
        epsilon=rule.epsilon,
        keep=1 - rule.rate * rule.decay,
        step_size=rule.rate / (1 - rule.beta1**rule.step),
        seeds=tuple(
            ((rule.seed + number) * 0x9E3779B1 + rule.start) & 0xFFFFFFFF for number in range(3)
        ),
        weight16=native.FLOATS[weight.dtype],
        gradient16=native.FLOATS[gradient.dtype],
        moments16=native.FLOATS[first.dtype],
    )
    native.loaded().adamw(ctypes.byref(about), weight.numel(), torch.get_num_threads())
