"""WEIGHT -> ITS PLACE IN THE WHOLE. What each rank's part of a weight is a part of, as a DTensor.

Layers compute with plain tensors and know of no mesh. For all else, checkpoints, norms, new weights
and the folder at the end, a part is seen as one of the whole, wherever the mesh has cut it.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from xverse.model.decoder import Decoder
from xverse.model.shape import ModelShape
from xverse.parallel.grid import EXPERT_SHARDS, SHARDS, Grid
from xverse.parallel.sequence import is_partial, tensor_side


class Layout:
    """Where the weights of a decoder of this whole shape are. All ranks make it at once.

    `host`: what is viewed lies in the host's memory, and not on the grid's devices.
    """

    def __init__(self, shape: ModelShape, grid: Grid, *, host: bool = False) -> None:
        self.shape, self.grid, self.host = shape, grid, host
        with torch.device("meta"):
            whole = Decoder(shape)
        self.sizes = {name: weight.shape for name, weight in whole.named_parameters()}
        self._meshes: dict[tuple[tuple[str, ...], ...], DeviceMesh] = {}

    def view(self, name: str, weight: Tensor, memory: Tensor | None = None) -> Tensor:
        """The whole weight of which `weight` is what this rank has, on the same memory, or on
        `memory`, which is as large.

        This rank's part itself where that is the whole and no other rank has it.
        """
        given = weight.detach()
        local = _local(given) if memory is None else memory
        if name in self.sizes:
            size, dims = self.sizes[name], self._cuts(name)
        elif isinstance(given, DTensor):  # an adapter's, which FSDP2 alone has cut
            size = given.shape
            dims = list(zip((("data",), SHARDS), given.placements, strict=True))
        else:
            return local
        if not dims or self.grid.ranks.size == 1:
            return local
        mesh = self._mesh(tuple(names for names, _ in dims))
        stride = torch.empty(size, device="meta").stride()
        placements = [placement for _, placement in dims]
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=size, stride=stride
        )

    def add_partial(self, decoder: Decoder) -> None:
        """After the last backward pass of a step: add what ranks along `tensor` have of the
        gradients of weights that they all have, in fp32 and at once."""
        if self.grid.size("tensor") == 1:
            return
        partial = [
            _local(weight.grad)
            for name, weight in decoder.named_parameters()
            if weight.grad is not None and is_partial(name, self.shape)
        ]
        if not partial:
            return
        flat = torch.cat([gradient.flatten().float() for gradient in partial])
        dist.all_reduce(flat, group=self.grid.group("tensor"))
        added = flat.split([gradient.numel() for gradient in partial])
        for gradient, whole in zip(partial, added, strict=True):
            gradient.copy_(whole.view_as(gradient))

    def _cuts(self, name: str) -> list[tuple[tuple[str, ...], Placement]]:
        """Along which axes ranks share a weight, and how; the first cut comes first."""
        side = tensor_side(name, self.shape, self.grid.size("tensor"))
        dim = len(self.sizes[name])
        cuts: list[tuple[tuple[str, ...], Placement]] = [
            (("tensor",), Replicate() if side is None else Shard(dim + side))
        ]
        if ".mlp.experts." in name:
            cuts += [(("expert",), Shard(0)), (EXPERT_SHARDS, Shard(0))]
        else:
            cuts.append((SHARDS, Shard(0)))
        cuts.append((("data",), Replicate()))
        return [cut for cut in cuts if self.grid.size(*cut[0]) > 1]

    def _mesh(self, dims: tuple[tuple[str, ...], ...]) -> DeviceMesh:
        if dims not in self._meshes:
            self._meshes[dims] = self.grid.mesh(*dims, host=self.host)
        return self._meshes[dims]


def whole_weights(
    own: Iterable[tuple[str, Tensor]], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """All weights of the model on every rank, one by one, from each rank's views of its own; every
    rank must ask for all."""
    grid = layout.grid
    if grid.size("pipeline") == 1:
        for name, view in own:
            yield name, view.full_tensor() if isinstance(view, DTensor) else view
        return
    views = dict(own)
    group, members = grid.group("pipeline"), grid.members("pipeline")
    owner = torch.zeros(len(layout.sizes), dtype=torch.int64)
    for number, name in enumerate(layout.sizes):
        owner[number] = grid.place("pipeline") if name in views else 0
    dist.all_reduce(owner, group=group)
    some = next(iter(views.values()))
    for place, (name, size) in zip(owner.tolist(), layout.sizes.items(), strict=True):
        if name in views:
            view = views[name]
            whole = view.full_tensor() if isinstance(view, DTensor) else view.contiguous()
        else:
            whole = torch.empty(size, dtype=some.dtype, device=some.device)
        dist.broadcast(whole, src=members[place], group=group)
        yield name, whole


def copies(view: Tensor) -> int:
    """How many ranks have the same part of it."""
    if not isinstance(view, DTensor):
        return 1
    found = 1
    for placement, size in zip(view.placements, view.device_mesh.shape, strict=True):
        found *= size if isinstance(placement, Replicate) else 1
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
