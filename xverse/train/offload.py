"""GRADIENTS -> HOST -> WEIGHTS. Updates of weights whose masters and moments the host keeps.

ZeRO-Offload (Ren et al. 2021): the device has weights and gradients, the host all that AdamW keeps
beside them. Gradients go down and new weights come up in pieces, each way on a stream of its own,
while the CPU updates the piece between.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from xverse.kernels import dispatch
from xverse.kernels.reference_train import AdamW

PIECE = 2**24  # numbers of a piece: 64 MiB in fp32, more than a millisecond's way over PCIe
PLACES = 2  # of the host, each way: one is copied while the other is read or written


class Load(NamedTuple):
    """One weight's update, as flat tensors: `gradient` and `model` are the device's, the others
    the host's; the model is given the new weight."""

    gradient: Tensor
    model: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor
    rule: AdamW


class Ferry:
    """Makes updates on the host for weights on `device`; on a CPU copies are made all the same."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        self._down, self._up = Lane(device, pinned=pinned), Lane(device, pinned=pinned)
        self._update = dispatch.adamw(torch.device("cpu")).call

    def carry(self, loads: Iterable[Load]) -> None:
        """Make all updates. A gradient that nothing else holds is freed when it has been used; what
        the device's current stream does next sees the new weights."""
        coming = enumerate(_pieces(loads))
        under_way = deque(self._fetched(*one) for one in islice(coming, PLACES))
        while under_way:
            number, piece, gradient = under_way.popleft()
            self._down.wait(number)
            self._up.send(number, self._updated(number, piece, gradient), piece.model)
            under_way.extend(self._fetched(*one) for one in islice(coming, 1))
        self._up.join()

    def _updated(self, number: int, piece: Load, gradient: Tensor) -> Tensor:
        """The new weight, as the model has it, in the place that it is sent from."""
        weight, new = piece.weight, self._up.place(number, piece.model)
        copy = None if weight.dtype == new.dtype else new
        self._update(weight, gradient, piece.first, piece.second, piece.rule, copy)
        return new if copy is not None else new.copy_(weight)

    def _fetched(self, number: int, piece: Load) -> tuple[int, Load, Tensor]:
        """The piece, and the place that its gradient is on the way to."""
        place = self._down.place(number, piece.gradient)
        self._down.send(number, piece.gradient, place)
        return number, piece, place


class Lane:
    """One direction: pieces are sent through PLACES places of the host in turn."""

    def __init__(self, device: torch.device, *, pinned: bool) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._sent = [torch.cuda.Event() for _ in range(PLACES)] if cuda else []
        self._places = [
            torch.empty(4 * PIECE, dtype=torch.uint8, pin_memory=pinned and cuda)
            for _ in range(PLACES)
        ]

    def place(self, number: int, like: Tensor) -> Tensor:
        """Where piece `number` stands on the host, after whatever was sent from or to there."""
        self.wait(number)
        return self._places[number % PLACES].view(like.dtype)[: like.numel()]

    def send(self, number: int, source: Tensor, target: Tensor) -> None:
        """Begin to copy piece `number`, behind what the device was told so far."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._sent[number % PLACES].record(self._stream)

    def wait(self, number: int) -> None:
        """Until piece `number` has been copied."""
        if self._sent:
            self._sent[number % PLACES].synchronize()

    def join(self) -> None:
        """Have the device wait, before it goes on, for all that was sent."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _pieces(loads: Iterable[Load]) -> Iterator[Load]:
    for load in loads:
        *tensors, rule = load
        for begin in range(0, load.weight.numel(), PIECE):
            parts = (tensor[begin : begin + PIECE] for tensor in tensors)
            yield Load(*parts, rule._replace(start=begin))
