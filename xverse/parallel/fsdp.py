"""DECODER -> ITS SHARE. Weights, gradients and what belongs to them, spread over ranks by FSDP2."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from xverse.model.decoder import Decoder
from xverse.model.feedforward import MixtureOfExperts
from xverse.parallel.grid import EXPERT_SHARDS, SHARDS, Grid
from xverse.parallel.pipeline import stages_of


def shard(
    decoder: Decoder, grid: Grid, *, reshard: bool, offload: OffloadPolicy | None = None
) -> Decoder:
    """The decoder, each rank keeping its part of every weight, along `shard` and those axes whose
    ranks have the same weights and see other tokens.

    Gradients are summed over ranks in fp32, not averaged. `reshard`: whether a block's gathered
    weights are given back after its forward pass. Ranks that share no weights keep the decoder
    as it is, unless it is to `offload`: then a rank's part of weights and gradients is in the
    host's memory, and whole units are on the device while they compute.
    """
    alone = grid.size("data", *SHARDS) == 1
    if alone and offload is None:
        return decoder
    mesh = grid.mesh(("data",), SHARDS)
    # One rank has nothing to sum, and would have a copy in fp32 made for nothing.
    policy = MixedPrecisionPolicy(reduce_dtype=None if alone else torch.float32)
    whole: Sequence[nn.Module] = stages_of(decoder) or [decoder]
    units: list[tuple[nn.Module, DeviceMesh, bool]] = []
    for block in decoder.model.layers:
        if isinstance(block.mlp, MixtureOfExperts):
            # A router is in fp32, and a unit has one dtype.
            units.append((block.mlp.router, mesh, False))
            if grid.size("expert") > 1:
                units.append((block.mlp.experts, grid.mesh(("data",), EXPERT_SHARDS), reshard))
        units.append((block, mesh, reshard))
    # Embedding, last norm and head: needed first and last, and kept between.
    units += [(part, mesh, False) for part in whole]
    for unit, its_mesh, given_back in units:
        fully_shard(
            unit,
            mesh=its_mesh,
            mp_policy=policy,
            reshard_after_forward=given_back,
            offload_policy=offload or OffloadPolicy(),
        )
        assert isinstance(unit, FSDPModule)
        # A sum, divided by nothing: the loss is divided by the targets of all ranks already.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if whole == [decoder]:
        register_fsdp_forward_method(decoder, "hidden")
    return decoder


def offload_policy(device: torch.device, *, pinned: bool) -> OffloadPolicy:
    """What keeps weights and gradients in the host's memory; pinned only where there is a GPU."""
    return CPUOffloadPolicy(pin_memory=pinned and device.type == "cuda")


def accumulate(decoder: Decoder, *, last: bool, every: bool = False) -> None:
    """Whether gradients of the next backward pass are the last ones, to be summed over ranks; with
    `every`, those of each pass are, and none of them stays on the device."""
    if isinstance(decoder, FSDPModule):
        decoder.set_requires_gradient_sync(last or every)
        decoder.set_is_last_backward(last or every)  # which waits for copies to the host
