"""THE SPECIFICATION OF TRAINING. Loss, updates and 8-bit products, as plain PyTorch.

Letters as in `reference`; N output of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels.reference import FP8_LARGEST, attend

FP8 = torch.float8_e4m3fn
MUON = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values towards one
_32 = 0xFFFFFFFF


class Scored(NamedTuple):
    """Sums over the targets that count, in fp32: cross-entropy, and z-loss before its factor."""

    loss: Tensor
    z_loss: Tensor


def attend_documents(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Sequence[int]
) -> Tensor:
    """Causal attention of each document by itself. -> [T, H, E]."""
    parts = (x.split(list(documents)) for x in (q_THE, k_TKE, v_TKE))
    return torch.cat([attend(q, k, v) for q, k, v in zip(*parts, strict=True)])


def cross_entropy(x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, mask_T: Tensor) -> Scored:
    """Of logits x @ head.T, rounded to x's dtype, against `targets`, where `mask` is true.

    z-loss is the square of the logarithm of softmax's denominator (PaLM, Chowdhery et al. 2022).
    """
    logits_TV = functional.linear(x_TD, head_VD).float()
    lse_T = logits_TV.logsumexp(-1)
    loss_T = lse_T - logits_TV.gather(-1, targets_T[:, None])[:, 0]
    zero = torch.zeros_like(loss_T)
    return Scored(
        torch.where(mask_T, loss_T, zero).sum(), torch.where(mask_T, lse_T.square(), zero).sum()
    )


def score_logits(
    logits_TV: Tensor, targets_T: Tensor, mask_T: Tensor, z_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and z-loss of some logits, summed, and the gradient of loss + factor * z-loss
    with respect to them, in their dtype."""
    logits = logits_TV.float()
    lse_T = logits.logsumexp(-1)
    picked_T = logits.gather(-1, targets_T[:, None])[:, 0]
    zero = torch.zeros_like(lse_T)
    share_T1 = torch.where(mask_T, 1 + 2 * z_factor * lse_T, zero)[:, None]
    columns_V = torch.arange(logits.shape[1], device=logits.device)
    hit_TV = (columns_V == targets_T[:, None]) & mask_T[:, None]
    gradient_TV = (logits - lse_T[:, None]).exp() * share_T1 - hit_TV.float()
    return (
        torch.where(mask_T, lse_T - picked_T, zero).sum(),
        torch.where(mask_T, lse_T.square(), zero).sum(),
        gradient_TV.to(logits_TV.dtype),
    )


def quantize_tensor(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """x as 8-bit floating point with one scale, and that scale: x is about fp8 * scale."""
    scale = (x.detach().abs().amax().float() / largest).clamp_min(2.0**-100)
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def multiply_fp8(x_TD: Tensor, w_ND: Tensor, *, gradient: bool = False) -> Tensor:
    """x @ w.T, both rounded to 8 bits by one scale each, summed in fp32. -> [T, N] in x's dtype.

    Values are e4m3; with `gradient`, x is e5m2, which has the range that gradients need
    (Micikevicius et al. 2022, FP8 formats for deep learning).
    """
    kind, largest = (torch.float8_e5m2, 57344.0) if gradient else (FP8, FP8_LARGEST)
    x_fp8, x_scale = quantize_tensor(x_TD, kind, largest)
    w_fp8, w_scale = quantize_tensor(w_ND, FP8, FP8_LARGEST)
    return ((x_fp8.float() @ w_fp8.float().T) * (x_scale * w_scale)).to(x_TD.dtype)


class AdamW(NamedTuple):
    """The numbers of one update; `step` counts from 1, `scale` is multiplied to the gradient."""

    rate: float
    beta1: float
    beta2: float
    epsilon: float
    decay: float
    step: int
    scale: float
    seed: int  # of the random rounding of what is kept in bf16
    start: int = 0  # where in the whole weight a piece of it begins: places are rounded by number


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rule: AdamW,
    copy: Tensor | None = None,
) -> None:
    """One update, in place (Loshchilov and Hutter 2019, algorithm 2), computed in fp32.

    What is kept in bf16, weight or moments, is rounded at random. `copy` gets the weight, rounded
    to nearest: the bf16 weight beside its fp32 master.
    """
    gradient_ = gradient.float() * rule.scale
    first_ = first.float().lerp(gradient_, 1 - rule.beta1)
    second_ = second.float() * rule.beta2 + (1 - rule.beta2) * gradient_.square()
    root = (second_ / (1 - rule.beta2**rule.step)).sqrt() + rule.epsilon
    weight_ = weight.float() * (1 - rule.rate * rule.decay)
    weight_ = weight_ - rule.rate / (1 - rule.beta1**rule.step) * (first_ / root)
    for number, (kept, new) in enumerate(((weight, weight_), (first, first_), (second, second_))):
        rounds = kept.dtype != new.dtype
        kept.copy_(round_randomly(new, rule.seed + number, rule.start) if rounds else new)
    if copy is not None:
        copy.copy_(weight_)


def round_randomly(x: Tensor, seed: int, start: int = 0) -> Tensor:
    """fp32 as bf16, up or down with the odds of its place between the two: right on average.

    The 16 random bits of element i are a hash of start + i + seed (lowbias32, Wellons 2018).
    """
    places = torch.arange(start, start + x.numel(), device=x.device).view(x.shape)
    bits = places + (seed * 0x9E3779B1 & _32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        bits = ((bits & _32) ^ ((bits & _32) >> shift)) * factor
    rounded = (x.view(torch.int32) + (bits & 0xFFFF).int()) & -0x10000
    return rounded.view(torch.float32).bfloat16()


def orthogonalize(matrix_ND: Tensor, steps: int = 5) -> Tensor:
    """The matrix with all singular values near one, by Newton-Schulz steps; [..., N, D], bf16.

    Muon (Jordan et al. 2024); on a CPU in fp32, which is faster there.
    """
    a, b, c = MUON
    x = matrix_ND.bfloat16() if matrix_ND.is_cuda else matrix_ND.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT


def muon_direction(matrix_ND: Tensor) -> Tensor:
    """The whole matrix orthogonalized, its elements as large as those of AdamW's updates usually
    are, so that both share rate and decay (Liu et al. 2025, Muon is scalable, eq. 4)."""
    return orthogonalize(matrix_ND) * (0.2 * max(matrix_ND.shape[-2:]) ** 0.5)


def muon(
    weight: Tensor, direction: Tensor, *, rate: float, decay: float, copy: Tensor | None = None
) -> None:
    """One update along a `muon_direction`, or a part of both, in place."""
    weight.mul_(1 - rate * decay).add_(direction.float(), alpha=-rate)
    if copy is not None:
        copy.copy_(weight)
