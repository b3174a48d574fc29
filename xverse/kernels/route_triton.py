"""X -> WHO COMPUTES IT. The router of a few tokens on a GPU: norm, logits and choice in one launch.

Some programs share a token's logits; the one that finishes last chooses, so that equal inputs give
equal bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import wait_for_input
from xverse.kernels.reference import Norm

ROUTED_TOGETHER = 4  # experts whose logits one program computes


@dataclass(frozen=True)
class Scratch:
    """Where the router's programs meet; one for all layers. `arrived` is 0 between launches."""

    logits: Tensor  # [T, X] fp32
    arrived: Tensor  # [T] int32

    @classmethod
    def reserve(cls, tokens: int, experts: int, device: torch.device | str) -> "Scratch":
        return cls(
            logits=torch.empty(tokens, experts, device=device),
            arrived=torch.zeros(tokens, dtype=torch.int32, device=device),
        )


@triton.jit
def scaled(x, scale, gain, dtype: tl.constexpr, ROUNDED: tl.constexpr):
    """x normalized by a scale and a gain that are known, rounded as `reference.rms_norm` rounds."""
    x = x.to(tl.float32) * scale
    if ROUNDED:
        x = x.to(dtype).to(tl.float32)
    return (x * gain).to(dtype).to(tl.float32)


@triton.jit
def _choose(
    logits_ptr, weights_ptr, chosen_ptr, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    ALL_X: tl.constexpr, ALL_C: tl.constexpr,
):  # fmt: skip
    """`reference.route` of one token whose logits are known; of equals, the lower number."""
    expert = tl.arange(0, ALL_X)
    choice = tl.arange(0, ALL_C)
    # Past the first-level cache, which may hold old ones.
    logits = tl.load(logits_ptr + expert, expert < EXPERTS, float("-inf"), cache_modifier=".cg")
    scores = tl.exp(logits - tl.max(logits, 0))
    left = tl.where(expert < EXPERTS, scores / tl.sum(scores, 0), -1.0)
    weights = tl.zeros([ALL_C], tl.float32)
    chosen = tl.zeros([ALL_C], tl.int32)
    for place in tl.static_range(CHOSEN):
        best = tl.max(left, 0)
        # NaN equals nothing, and the number must all the same be one of an expert.
        number = tl.min(tl.where(left == best, expert, EXPERTS - 1), 0)
        weights = tl.where(choice == place, best, weights)
        chosen = tl.where(choice == place, number, chosen)
        left = tl.where(expert == number, -1.0, left)
    weights /= tl.sum(weights, 0) + 1e-6
    tl.store(weights_ptr + choice, weights.to(weights_ptr.dtype.element_ty), choice < CHOSEN)
    tl.store(chosen_ptr + choice, chosen, choice < CHOSEN)


@triton.jit
def _route(
    x_ptr, norm_ptr, router_ptr, normed_ptr, logits_ptr, weights_ptr, chosen_ptr, arrived_ptr, eps,
    EXPERTS: tl.constexpr, INPUTS: tl.constexpr, CHOSEN: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, ALL_X: tl.constexpr, ALL_C: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, some experts): their logits; the program that comes last chooses."""
    token, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    known = column < INPUTS
    expert = part * BLOCK_X + tl.arange(0, BLOCK_X)
    router_at = router_ptr + expert[:, None] * INPUTS + column[None, :]
    router = tl.load(router_at, (expert < EXPERTS)[:, None] & known[None, :], 0.0)
    gain = tl.load(norm_ptr + column, known, 0.0).to(tl.float32)
    wait_for_input(PDL)

    x = tl.load(x_ptr + token * INPUTS + column, known, 0.0)
    dtype: tl.constexpr = x.dtype
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / INPUTS + eps)
    normed = scaled(x, scale, gain, dtype, ROUNDED)
    tl.store(normed_ptr + token * INPUTS + column, normed.to(dtype), known & (part == 0))
    logits = tl.sum(router.to(tl.float32) * normed[None, :], 1)
    tl.store(logits_ptr + token * EXPERTS + expert, logits, expert < EXPERTS)
    tl.debug_barrier()  # all of the program's stores, before the one that announces them
    parts: tl.constexpr = (EXPERTS + BLOCK_X - 1) // BLOCK_X
    if tl.atomic_add(arrived_ptr + token, 1, sem="acq_rel") == parts - 1:
        _choose(
            logits_ptr + token * EXPERTS, weights_ptr + token * CHOSEN, chosen_ptr + token * CHOSEN,
            EXPERTS, CHOSEN, ALL_X, ALL_C,
        )  # fmt: skip
        tl.store(arrived_ptr + token, 0)


def route_rows(
    x_TD: Tensor,
    router_XD: Tensor,
    top_k: int,
    norm: Norm,
    *,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) [T, D], and its `reference.route`: weights [T, C], experts [T, C] as int32."""
    tokens, inputs = x_TD.shape
    experts = router_XD.shape[0]
    scratch = scratch or Scratch.reserve(tokens, experts, x_TD.device)
    normed_TD = torch.empty_like(x_TD)
    weights_TC = x_TD.new_empty(tokens, top_k)
    chosen_TC = torch.empty(tokens, top_k, dtype=torch.int32, device=x_TD.device)
    _route[(tokens, triton.cdiv(experts, ROUTED_TOGETHER))](
        x_TD, norm.weight_D, router_XD, normed_TD, scratch.logits, weights_TC, chosen_TC,
        scratch.arrived, norm.eps,
        EXPERTS=experts, INPUTS=inputs, CHOSEN=top_k, ROUNDED=not norm.weight_in_fp32,
        BLOCK_X=ROUTED_TOGETHER, BLOCK_D=triton.next_power_of_2(inputs),
        ALL_X=triton.next_power_of_2(experts), ALL_C=triton.next_power_of_2(top_k),
        PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return normed_TD, weights_TC, chosen_TC
