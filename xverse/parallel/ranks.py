"""PROCESSES -> TOTALS. The processes of one training run, as torchrun starts them, or just one."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from xverse.device import env, pick_device
from xverse.parallel.mesh import loopback, require_alone

TIMEOUT = timedelta(minutes=30)  # the slowest step: the first, in which everything is compiled


class Ranks:
    """This process among `size` that train one model. All must make the same calls in order."""

    def __init__(
        self, rank: int, size: int, device: torch.device, *, grouped: bool = False
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.grouped = grouped or size > 1  # in a group of torch.distributed, even if alone in it
        # Whoever writes checkpoints talks beside the training, so on a group of its own.
        self.aside = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None

    @classmethod
    def start(cls, device: str = "auto", *, grouped: bool = False) -> "Ranks":
        """Meet the others that torchrun's RANK and WORLD_SIZE speak of; without them, be alone, and
        with `grouped` all the same in a process group, which FSDP2 wants."""
        size = int(env("WORLD_SIZE", "1"))
        if size == 1 and not grouped:
            return cls(0, 1, pick_device(device))
        require_alone()
        place = pick_device(device)
        if place.type == "cuda":
            own = int(env("LOCAL_RANK", "0")) if size > 1 else place.index or 0
            place = torch.device("cuda", own)
            torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        if size == 1:
            with loopback():
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=TIMEOUT)
        return cls(dist.get_rank(), size, place, grouped=True)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of what all ranks give, in fp64; all wait for each other."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def any(self, holds: bool) -> bool:
        """Whether it holds on some rank."""
        return self.total([float(holds)])[0] > 0

    def from_first(self, value: float) -> float:
        """What rank 0 gives, on every rank."""
        return self.total([value if self.first else 0.0])[0]

    def close(self) -> None:
        if self.grouped and dist.is_initialized():
            dist.destroy_process_group()
