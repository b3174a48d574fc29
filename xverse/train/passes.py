"""STEP -> PARTS OF ITS LOSS. The passes of a step through the model, wherever its parts are."""

import json
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from xverse.data.loader import Batch, Step
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.parallel.context import own_part
from xverse.parallel.fsdp import accumulate
from xverse.parallel.grid import Grid
from xverse.parallel.pipeline import Inputs, Pipeline, Stage, stages_of
from xverse.train.balance import weigh
from xverse.train.objective import Objective, Part
from xverse.train.options import Training

NAMES = 4096  # bytes: what an objective reports besides its loss, as JSON


class Passes(Protocol):
    """How a step goes through the model. All ranks call it alike."""

    def __call__(self, step: Step, *, learn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the step's loss and of the other numbers, and to `learn` their
        gradients, added to those that are there. Every rank tells the same other numbers."""
        ...


def passes_of(decoder: Decoder, objective: Objective, grid: Grid, options: Training) -> Passes:
    """Of a decoder that is prepared for this grid. XverseError where passes do not divide."""
    tokens, parts = options.rows_per_pass * options.row_tokens, grid.size("context", "tensor")
    if tokens % parts:
        raise XverseError(
            f"A pass of {tokens} tokens cannot be shared by {parts} devices.",
            "Those along `tensor` and `context` of [mesh] all have equally many of its tokens.",
            f"Take row_tokens that are a multiple of {parts}.",
        )
    stages = stages_of(decoder)
    assert bool(stages) == (grid.size("pipeline") > 1), "the decoder is prepared for another grid"
    balance = options.compute.balance if decoder.shape.num_experts else 0.0
    if not stages:
        every = options.compute.offload == "parameters"
        return Whole(decoder, objective, grid, balance=balance, every=every)
    return Pipelined(
        decoder,
        objective,
        grid,
        stages,
        passes=options.rows_per_step // (grid.axes.readers * options.rows_per_pass),
        tokens=tokens,
        balance=balance,
    )


class Whole:
    """Passes one after another through a decoder that this rank has all layers of; with `every`,
    the gradients of each go where they are kept."""

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        grid: Grid,
        *,
        balance: float,
        every: bool = False,
    ) -> None:
        self.decoder, self.objective, self.grid = decoder, objective, grid
        self.balance, self.every = balance, every

    def __call__(self, step: Step, *, learn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        parts = []
        for number, batch in enumerate(step.passes, start=1):
            if learn:
                accumulate(self.decoder, last=number == len(step.passes), every=self.every)
            own = own_batch(batch, self.grid)
            weigh(self.decoder, self.balance * len(own.ids) / step.tokens, own.ids.device)
            part = self.objective(self.decoder, own, step.units)
            if learn:
                part.loss.backward()
            parts.append(part)
        return _sums(parts)


class Pipelined:
    """Passes at once on several stages; the objective is asked where the last one is."""

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        grid: Grid,
        stages: tuple[Stage, ...],
        *,
        passes: int,
        tokens: int,
        balance: float,
    ) -> None:
        self.decoder, self.objective, self.grid = decoder, objective, grid
        self.balance = balance
        whole = tokens // grid.size("context")
        between = whole // grid.size("tensor")
        self.pipeline = Pipeline(stages, grid, self._loss, passes=passes, tokens=(whole, between))
        self._batches: list[Batch] = []
        self._units = 1
        self._parts: dict[int, Part] = {}
        self._names: list[str] | None = None

    def __call__(self, step: Step, *, learn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        self._batches = [own_batch(batch, self.grid) for batch in step.passes]
        self._units, self._parts = step.units, {}
        first = self._batches[0].ids
        weigh(self.decoder, self.balance * len(first) / step.tokens, first.device)
        dtype = self.decoder.dtype
        given = [
            Inputs(batch.positions, Packed(batch.documents, batch.ids.device, dtype))
            for batch in self._batches
        ]
        self.pipeline.run([batch.ids for batch in self._batches], given, learn=learn)
        found, also = _sums(self._parts[number] for number in sorted(self._parts))
        return found.to(self.grid.ranks.device), self._named(also)

    def _loss(self, x_TD: Tensor, number: int) -> Tensor:
        """What the objective says, to whom the stage's output is all that `hidden` gives."""
        vars(self.decoder)["hidden"] = lambda *inputs: x_TD
        self._parts[number] = self.objective(self.decoder, self._batches[number], self._units)
        return self._parts[number].loss

    def _named(self, also: dict[str, Tensor]) -> dict[str, Tensor]:
        """Zeros on other ranks than those of the last stage, which tells the names once."""
        if self._names is None:
            text = json.dumps(list(also)).encode().ljust(NAMES)
            told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            last = self.grid.members("pipeline")[-1]
            dist.broadcast(told, src=last, group=self.grid.group("pipeline"))
            self._names = json.loads(told.numpy().tobytes())
            assert self._names is not None
        zero = torch.zeros((), device=self.grid.ranks.device)
        return {name: also.get(name, zero) for name in self._names}


def own_batch(batch: Batch, grid: Grid) -> Batch:
    """A pass on this rank's device: its part of the tokens, and all documents that they are of."""
    here = batch.to(grid.ranks.device)
    return Batch(
        ids=own_part(here.ids, grid),
        targets=own_part(here.targets, grid),
        mask=own_part(here.mask, grid),
        positions=own_part(here.positions, grid),
        documents=here.documents,
    )


def _sums(parts: Iterable[Part]) -> tuple[Tensor, dict[str, Tensor]]:
    losses: list[Tensor] = []
    also: dict[str, Tensor] = {}
    for part in parts:
        losses.append(part.loss.detach())
        for name, value in part.also.items():
            also[name] = also.get(name, 0) + value.detach()
    return torch.stack(losses).sum() if losses else torch.zeros(()), also
