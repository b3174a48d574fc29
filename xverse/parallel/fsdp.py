"""DECODER -> ITS SHARE. Weights, gradients and what belongs to them, spread over ranks by FSDP2."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from xverse.model.decoder import Decoder
from xverse.model.feedforward import MixtureOfExperts
from xverse.parallel.ranks import Ranks


def shard(decoder: Decoder, ranks: Ranks, axes: tuple[int, int], *, reshard: bool) -> Decoder:
    """The decoder, each rank keeping its part of every weight; `axes` are (data, shard).

    Gradients are summed over ranks in fp32, not averaged. `reshard`: whether a block's gathered
    weights are given back after its forward pass. One rank keeps the decoder as it is.
    """
    if ranks.size == 1:
        return decoder
    mesh = init_device_mesh(ranks.device.type, axes, mesh_dim_names=("data", "shard"))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    units: list[torch.nn.Module] = []
    routers: list[torch.nn.Module] = []
    for block in decoder.model.layers:
        if isinstance(block.mlp, MixtureOfExperts):
            routers.append(block.mlp.router)  # in fp32, and a unit has one dtype
            units.append(block.mlp.router)
        units.append(block)
    units.append(decoder)  # embedding, last norm and head: needed first and last, and kept between
    for unit in units:
        kept = not reshard or unit is decoder or unit in routers
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not kept)
        assert isinstance(unit, FSDPModule)
        # A sum, divided by nothing: the loss is divided by the targets of all ranks already.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(decoder, "hidden")
    return decoder


def accumulate(decoder: Decoder, *, last: bool) -> None:
    """Whether gradients of the next backward pass are the last ones, to be summed over ranks."""
    if isinstance(decoder, FSDPModule):
        decoder.set_requires_gradient_sync(last)
        decoder.set_is_last_backward(last)
