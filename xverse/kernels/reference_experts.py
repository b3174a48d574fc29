"""THE SPECIFICATION OF EXPERTS. The mixture of a block, as plain PyTorch; a letter more in names.

C is a token's choice: `chosen_TC` holds the numbers of the experts that each token has, best first.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels.reference import Norm, rms_norm, route, swiglu


class Stacks(NamedTuple):
    """The weights of all routed experts of a layer, expert number first."""

    gate_XFD: Tensor
    up_XFD: Tensor
    down_XDF: Tensor


class Experts(Protocol):
    """The routed experts of a layer: the SwiGLU of one, [T, D] -> [T, D], and what they hold."""

    def __call__(self, x_TD: Tensor, expert: int) -> Tensor: ...

    def stacks(self) -> Stacks: ...


class Mixture(NamedTuple):
    """The weights of a mixture of experts. The shared expert, if any, is a whole multiple of F."""

    router_XD: Tensor
    stacks: Stacks
    shared_gate_up_ND: Tensor | None  # gate above, up below
    shared_down_DF: Tensor | None
    top_k: int


def mix_experts(x_TD: Tensor, weights_TC: Tensor, chosen_TC: Tensor, experts: Experts) -> Tensor:
    """What the chosen experts make of each token, weighed and summed. -> [T, D] in x's dtype."""
    mixed_TD = torch.zeros_like(x_TD)
    for expert in chosen_TC.unique().tolist():
        tokens, choice = (chosen_TC == expert).nonzero(as_tuple=True)
        share = weights_TC[tokens, choice, None]
        mixed_TD.index_add_(0, tokens, experts(x_TD[tokens], expert) * share)
    return mixed_TD


def add_shared(mixed_TD: Tensor, x_TD: Tensor, mixture: Mixture) -> Tensor:
    """`mixed`, plus what the shared expert makes of x, if there is one."""
    if mixture.shared_gate_up_ND is None or mixture.shared_down_DF is None:
        return mixed_TD
    inner_TF = swiglu(*functional.linear(x_TD, mixture.shared_gate_up_ND).chunk(2, dim=-1))
    return mixed_TD + functional.linear(inner_TF, mixture.shared_down_DF)


def mixture_rows(x_TD: Tensor, mixture: Mixture, norm: Norm) -> Tensor:
    """x + mixture(norm(x)) of a few tokens: the second half of a block. -> [T, D]."""
    normed_TD = rms_norm(x_TD, norm.weight_D, norm.eps, weight_in_fp32=norm.weight_in_fp32)
    weights_TC, chosen_TC = route(normed_TD, mixture.router_XD, mixture.top_k)
    mixed_TD = mix_experts(normed_TD, weights_TC, chosen_TC, Plain(mixture.stacks))
    return x_TD + add_shared(mixed_TD, normed_TD, mixture)


class Plain:
    """`Experts` by PyTorch alone."""

    def __init__(self, stacks: Stacks) -> None:
        self._stacks = stacks

    def __call__(self, x_TD: Tensor, expert: int) -> Tensor:
        gate_FD, up_FD, down_DF = (stack[expert] for stack in self._stacks)
        inner_TF = swiglu(functional.linear(x_TD, gate_FD), functional.linear(x_TD, up_FD))
        return functional.linear(inner_TF, down_DF)

    def stacks(self) -> Stacks:
        return self._stacks
