"""RANKS -> ONE MACHINE. The processes that share a model, and how they join what each computed."""

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from xverse.errors import XverseError
from xverse.kernels import dispatch, reference
from xverse.kernels.choice import Choice
from xverse.log import logger
from xverse.parallel.plan import vocabulary_share

if TYPE_CHECKING:
    from xverse.kernels.allreduce_triton import Exchange

# PyTorch 2.13 has given it another name, and warns of the old one.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
TIMEOUT = timedelta(minutes=5)  # for ranks to meet, and for one to wait for what another sends


class Mesh:
    """This rank's place among `size` processes, one a device of this machine.

    All ranks must make the same calls in the same order; on a GPU, on one stream each.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.columns = 0
        self._add: Choice | None = None
        self._gather: Choice | None = None
        self._sums: Exchange | None = None
        self._gathers: Exchange | None = None
        self._side: torch.cuda.Stream | None = None
        self._abandoned = False

    @classmethod
    def start(cls, meeting: Path, rank: int, size: int, device: torch.device) -> "Mesh":
        """Meet the other ranks at a file that does not exist yet, the same for all of them.

        Raises XverseError where this process is in a process group already.
        """
        require_alone()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
        # Rank 0 is somebody's own process, which NCCL's watchdog would end with the other ranks.
        quiet = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
        with loopback(), _environment(quiet):
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
            )
        return cls(rank, size, device)

    def reserve(self, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
        """Make ready for sums of [T, hidden] and gathers to [T, vocabulary]."""
        self.columns = vocabulary
        self._sums = self._gathers = None
        if self.device.type != "cuda":
            return
        self._add = dispatch.add_parts(self.device, dtype)
        self._gather = dispatch.gather_columns(self.device, dtype)
        logger.info("%s", self._add)
        if self._add.call is reference.add_parts:
            return
        from xverse.kernels import allreduce_triton as kernels

        why_not = ""
        try:
            words = kernels.REDUCED_ROWS * hidden // 2
            self._sums = share_memory(self, words)
            self._gathers = share_memory(self, kernels.GATHERED_ROWS * self._share)
        except RuntimeError as error:
            why_not = str(error).splitlines()[0]
        if not self.all(not why_not):
            self._sums = self._gathers = None
            why_not = why_not or "another rank has no shared memory"
            logger.warning("sums over GPUs go through NCCL, and slower: %s", why_not)
            return
        self._side = torch.cuda.Stream(self.device)

    def reduce(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        """The sum of all ranks' x, in the order of the ranks, and the residual on top; the same
        bits everywhere. May overwrite x."""
        if self._sums is not None and self._add is not None:
            from xverse.kernels.allreduce_triton import REDUCED_ROWS

            if len(x_TD) <= REDUCED_ROWS:
                return self._add.call(x_TD, self._sums, residual_TD)
        if self.device.type == "cuda":
            dist.all_reduce(x_TD)
            return x_TD if residual_TD is None else residual_TD + x_TD
        return reference.add_parts(self._collected(x_TD), residual_TD)

    def gather(self, x_TN: Tensor) -> Tensor:
        """The columns of all ranks side by side, [T, vocabulary], on every rank."""
        share = self._share
        if self._gathers is not None and self._gather is not None:
            from xverse.kernels.allreduce_triton import GATHERED_ROWS

            if len(x_TN) <= GATHERED_ROWS:
                return self._gather.call(x_TN, self._gathers, share, self.columns)
        padded = torch.nn.functional.pad(x_TN, (0, share - x_TN.shape[1]))
        return reference.gather_columns(self._collected(padded), self.columns)

    def all(self, holds: bool) -> bool:
        """Whether it holds on every rank; all wait for each other."""
        return bool(self.least(int(holds)))

    def least(self, number: int) -> int:
        """The least of what the ranks give; all wait for each other."""
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def abandon(self) -> None:
        """Another rank is gone: let go of everything that waits for it, from any thread.

        What is being computed ends with numbers that mean nothing, or with a RuntimeError.
        """
        if self._abandoned:
            return
        self._abandoned = True
        if self._side is not None:
            with torch.cuda.device(self.device), torch.cuda.stream(self._side):
                for exchange in (self._sums, self._gathers):
                    if exchange is not None:
                        exchange.abandoned.fill_(1)
        if self.device.type == "cuda" and dist.is_initialized():
            backend = dist.group.WORLD._get_backend(self.device)  # type: ignore[union-attr]
            backend.abort()  # NCCL would wait for ever; gloo sees the closed connection itself

    def close(self) -> None:
        """Leave the group. Nothing may be computed on the mesh after it."""
        self._sums = self._gathers = None
        if dist.is_initialized():
            # An aborted group may object to being left.
            with contextlib.suppress(*[RuntimeError] * self._abandoned):
                dist.destroy_process_group()

    @property
    def _share(self) -> int:
        return vocabulary_share(self.columns, self.size)

    def _collected(self, x_TN: Tensor) -> Tensor:
        """What every rank has, on every rank: [ranks, T, N]."""
        parts = x_TN.new_empty(self.size, *x_TN.shape)
        # As bytes, which every backend moves whatever the dtype.
        own = x_TN.contiguous().flatten().view(torch.uint8)
        _gather_into(parts.flatten().view(torch.uint8), own)
        return parts


def require_alone() -> None:
    """Raise XverseError where this process is in a group of torch.distributed already."""
    if dist.is_initialized():
        raise XverseError(
            "This process is in a process group of torch.distributed already.",
            "A model that is spread over devices starts a group of its own, and there is one a "
            "process.",
            "Close the other model first (`LLM.close`), or use another process.",
        )


def share_memory(mesh: Mesh, words: int, block: int | None = None) -> "Exchange":
    """Memory of this GPU that the others write into, and theirs: each has room for `words` words
    from every rank. All ranks ask at once. Raises RuntimeError where the GPUs cannot."""
    from torch.distributed import _symmetric_memory as symmetric

    from xverse.kernels.allreduce_triton import BLOCK, Exchange

    capacity = -(-words // 16) * 16
    size = Exchange.inbox_words(capacity, mesh.size)
    group = dist.group.WORLD
    assert group is not None, "the mesh has started"
    # PyTorch would bind NVLink multicast too, which nothing here uses.
    with _environment({"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}):
        inbox = torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p(
            (size,), (1,), torch.int64, mesh.device
        )
        inbox.zero_()
        handle = symmetric.rendezvous(inbox, group.group_name)
    peers = [handle.get_buffer(r, (size,), torch.int64).data_ptr() for r in range(mesh.size)]
    torch.cuda.synchronize(mesh.device)
    mesh.all(True)  # nobody writes before all inboxes are zero
    memory = (inbox, handle)
    return Exchange.of(peers, mesh.rank, capacity, mesh.device, memory, block or BLOCK)


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """Have groups that are made meanwhile keep to this machine: gloo listens on the network."""
    with _environment({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}):
        yield


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for libraries that take their options from nowhere else; what is set stays."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
