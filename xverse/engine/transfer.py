"""HOST <-> DEVICE. Copies that nobody waits for until their numbers are wanted."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor


def upload(numbers: object, device: torch.device, dtype: object = numpy.int64) -> Tensor:
    """A copy on the device that nobody waits for."""
    here = torch.from_numpy(numpy.asarray(numbers, dtype))  # type: ignore[call-overload]
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def fetch(parts: Sequence[Tensor | None]) -> Callable[[], list[list[Any] | None]]:
    """Start to copy tensors to the host; the function waits for them, and gives their numbers."""
    copies = [None if part is None else _start_copy(part) for part in parts]
    done = torch.cuda.Event() if any(part is not None and part.is_cuda for part in parts) else None
    if done is not None:
        done.record()

    def numbers() -> list[list[Any] | None]:
        if done is not None:
            done.synchronize()
        return [None if copy is None else copy.tolist() for copy in copies]

    return numbers


def _start_copy(part: Tensor) -> Tensor:
    if not part.is_cuda:
        return part.clone()
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
