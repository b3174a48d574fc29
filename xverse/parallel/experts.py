"""MIXTURE -> ITS SHARE OF EXPERTS. Tokens go to the ranks that have the experts they chose."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.kernels import dispatch
from xverse.model.decoder import Decoder
from xverse.model.feedforward import MixtureOfExperts
from xverse.model.linear import StackedLinear
from xverse.parallel.collect import exchange
from xverse.parallel.grid import Grid


@torch.no_grad()
def spread_experts(decoder: Decoder, grid: Grid) -> Decoder:
    """Keep this rank's experts along `expert`, in place; the mixtures answer as before.

    XverseError where the model has none, or their number does not divide.
    """
    place, size = grid.place("expert"), grid.size("expert")
    if size == 1:
        return decoder
    experts = decoder.shape.num_experts
    if not experts or experts % size:
        raise XverseError(
            f"This model cannot be trained with expert = {size} in [mesh].",
            f"Its {experts} experts cannot be divided by {size}."
            if experts
            else "It is dense: it has no experts.",
            "Take a divisor of the number of experts, or `shard` instead.",
        )
    for block in decoder.model.layers:
        mixture = block.mlp
        assert isinstance(mixture, MixtureOfExperts), "a shape has experts in all blocks or none"
        for stack in mixture.experts.children():
            assert isinstance(stack, StackedLinear)
            own = stack.weight.detach().chunk(size)[place]
            stack.weight = nn.Parameter(own.clone(memory_format=torch.contiguous_format))
        mixture.forward = functools.partial(_forward, mixture, grid.group("expert"))  # type: ignore[method-assign]
    return decoder


def _forward(mixture: MixtureOfExperts, group: dist.ProcessGroup, x_TD: Tensor) -> Tensor:
    """What MixtureOfExperts.forward gives, of experts that are on all ranks of `group`."""
    weights_TC, chosen_TC = mixture.router(x_TD)
    order_R = chosen_TC.flatten().argsort(stable=True)  # rows by expert, and so by rank
    token_R = order_R // chosen_TC.shape[1]
    sent_X = torch.bincount(chosen_TC.flatten(), minlength=len(mixture.router.weight))
    got_X = torch.empty_like(sent_X)  # by rank, and for each by this rank's experts
    dist.all_to_all_single(got_X, sent_X, group=group)
    sent, got = (counts.view(group.size(), -1).sum(1).tolist() for counts in (sent_X, got_X))
    rows_RD = exchange(x_TD[token_R], sent, got, group)
    own_X = torch.arange(len(got_X) // group.size(), device=x_TD.device).repeat(group.size())
    answered_RD = _answer(mixture, rows_RD, own_X.repeat_interleave(got_X))
    back_RD = exchange(answered_RD, got, sent, group)
    share_R1 = weights_TC.flatten()[order_R, None]
    mixed_TD = torch.zeros_like(x_TD).index_add(0, token_R, back_RD * share_R1)
    if mixture.shared_experts is not None:
        mixed_TD = mixed_TD + mixture.shared_experts(x_TD)
    return mixed_TD


def _answer(mixture: MixtureOfExperts, rows_RD: Tensor, expert_R: Tensor) -> Tensor:
    """What one of this rank's experts makes of each row, all of them with a weight of one."""
    if not len(rows_RD):  # nobody chose them; the backward pass needs this rank all the same
        none: Tensor = mixture.experts(rows_RD, 0)
        return none
    ones_R1 = torch.ones(len(rows_RD), 1, dtype=rows_RD.dtype, device=rows_RD.device)
    why_not = mixture.experts.one_by_one(rows_RD)
    mix = dispatch.mix_experts(rows_RD.device, rows_RD.dtype, why_not).call
    answered: Tensor = mix(rows_RD, ones_R1, expert_R[:, None], mixture.experts)
    return answered
