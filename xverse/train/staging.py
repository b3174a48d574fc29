"""DEVICE -> HOST, BESIDE THE NEXT STEP. What a checkpoint keeps, as it stood when it was asked for.

On a GPU the copies run on a stream of their own while the next step computes its gradients; only
the update, which changes what is copied, waits for them. On a CPU they are made at once.
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed._state_dict_utils import _create_cpu_state_dict
from torch.distributed.tensor import DTensor

from xverse.errors import XverseError

SLAB = 2**30  # bytes of pinned memory at a time: CUDA rounds each request up to a power of two
APART = 512  # bytes: where a tensor in a slab may begin


class Staging:
    """The host's copy of the tensors of a run, which are the same ones each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, Tensor] = {}
        self._reserving: threading.Thread | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to take the memory on a GPU's host: pinned, 7B's 44 GB take many seconds, which the
        first step has while it is compiled."""
        if self._stream is None or self._host or self._reserving is not None:
            return
        given = (dict(tensors),)
        self._reserving = threading.Thread(target=self._reserve, args=given, name="reserve")
        self._reserving.start()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Begin to copy; what comes is complete after `finish`. Until `hold` was called nothing may
        change the tensors, and until the next copy nothing changes what was given."""
        if self._stream is None:
            host = _create_cpu_state_dict(dict(tensors))
            for name, tensor in tensors.items():
                _local(host[name]).copy_(_local(tensor))
            return host
        self.reserve(tensors)
        assert self._reserving is not None
        self._reserving.join()
        if not self._host:
            raise XverseError(
                "This machine has no memory for a checkpoint.",
                f"{sum(_local(t).nbytes for t in tensors.values()):,} bytes could not be pinned.",
                "Free memory of the host, or spread the run over more machines.",
            )
        assert self._copied is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for name, tensor in tensors.items():
                _local(self._host[name]).copy_(_local(tensor), non_blocking=True)
        self._copied.record(self._stream)
        return dict(self._host)

    def hold(self) -> None:
        """Have the device wait, before it goes on, for copies that are still being made."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def finish(self) -> None:
        """Wait until all is copied."""
        if self._copied is not None:
            self._copied.synchronize()

    def _reserve(self, tensors: dict[str, Tensor]) -> None:
        with torch.cuda.device(self.device):
            self._host = in_slabs(_create_cpu_state_dict(tensors), pinned=True)


def in_slabs(host: dict[str, Tensor], *, pinned: bool) -> dict[str, Tensor]:
    """Tensors of these sizes, as many in one piece of memory as fit; what they hold is not kept."""
    found: dict[str, Tensor] = {}
    needed = {name: -(-_local(tensor).nbytes // APART) * APART for name, tensor in host.items()}
    total, left = sum(needed.values()), torch.empty(0, dtype=torch.uint8)
    for name, tensor in host.items():
        plain, size = _local(tensor), needed[name]
        if size > len(left):
            left = torch.empty(max(size, min(SLAB, total)), dtype=torch.uint8, pin_memory=pinned)
        total -= size
        part, left = left[: plain.nbytes], left[size:]
        place = part.view(plain.dtype).view(plain.shape)
        if isinstance(tensor, DTensor):
            tensor._local_tensor = place
            place = tensor
        found[name] = place
    return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
