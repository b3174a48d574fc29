"""RANKS -> ROWS AND COLUMNS. The processes of a training run along the axes of its mesh."""

from functools import cached_property, lru_cache
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from xverse.parallel.axes import ORDER, Axes
from xverse.parallel.ranks import TIMEOUT, Ranks

# Ranks between which weights are spread by FSDP2: those of the blocks, and those of experts, which
# already are on other devices along `expert`.
SHARDS = ("shard", "expert", "context")
EXPERT_SHARDS = ("shard", "context")

# Sets of axes along which ranks talk with each other.
GROUPS = (
    ("tensor",),
    ("context",),
    ("expert",),
    ("pipeline",),
    ("data",),
    SHARDS,
    EXPERT_SHARDS,
)


class Grid:
    """This process's place in the mesh. All ranks make it at the same time."""

    def __init__(self, ranks: Ranks, axes: Axes) -> None:
        self.ranks, self.axes = ranks, axes.resolve(ranks.size)
        sizes = [getattr(self.axes, name) for name in ORDER]
        self._all = torch.arange(ranks.size).view(sizes)
        place = (self._all == ranks.rank).nonzero()[0].tolist()
        self._here: dict[str, int] = dict(zip(ORDER, place, strict=True))
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        for names in GROUPS if ranks.grouped else ():
            self._start(names)

    def size(self, *names: str) -> int:
        """How many ranks there are along these axes."""
        return prod(getattr(self.axes, name) for name in names)

    def place(self, *names: str) -> int:
        """Which of them this one is, the last axis counted fastest."""
        number = 0
        for name in names:
            number = number * getattr(self.axes, name) + self._here[name]
        return number

    def members(self, *names: str) -> list[int]:
        """The ranks along these axes that are at this one's place on all others, by place."""
        at = tuple(slice(None) if name in names else self._here[name] for name in ORDER)
        kept = [name for name in ORDER if name in names]
        found: list[int] = self._all[at].permute([kept.index(n) for n in names]).flatten().tolist()
        return found

    def group(self, *names: str) -> dist.ProcessGroup:
        """The process group of `members`."""
        return self._groups[names]

    @cached_property
    def reader(self) -> int:
        """Which rows this rank reads: those with the same number read the same."""
        return self.place("data", "shard", "expert")

    def mesh(self, *dims: tuple[str, ...], host: bool = False) -> DeviceMesh:
        """The ranks along some of GROUPS, as PyTorch's DTensor and FSDP2 take them; with `host`, of
        tensors in the hosts' memory."""
        names = [name for dim in dims for name in dim]
        members = torch.tensor(self.members(*names)).view([self.size(*dim) for dim in dims])
        groups = [self._groups[dim] for dim in dims]
        kind = "cpu" if host else self.ranks.device.type
        if len(groups) == 1:
            return DeviceMesh.from_group(groups[0], kind, mesh_dim_names=("-".join(dims[0]),))
        titles = tuple("-".join(dim) for dim in dims)
        return DeviceMesh.from_group(groups, kind, members, mesh_dim_names=titles)

    def _start(self, names: tuple[str, ...]) -> None:
        """Every rank asks for all groups, its own or not, as PyTorch wants it."""
        others = [name for name in ORDER if name not in names]
        order = [ORDER.index(name) for name in (*others, *names)]
        for members in self._all.permute(order).reshape(-1, self.size(*names)).tolist():
            group = dist.new_group(members, timeout=TIMEOUT)
            if self.ranks.rank in members:
                self._groups[names] = group


@lru_cache(maxsize=16)  # groups are made once, however many parts of a run ask for them
def grid_of(ranks: Ranks, axes: Axes) -> Grid:
    """The grid of these processes. All ranks ask at the same time. XverseError as Axes.resolve."""
    return Grid(ranks, axes)
