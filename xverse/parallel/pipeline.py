"""LAYERS -> STAGES. Pipeline parallel: each rank has some of the layers, and passes overlap.

A stage is a run of blocks, the first with the embedding and the last with norm and head. Passes go
through them by the interleaved 1F1B schedule of torch.distributed.pipelining (Narayanan et al.
2021, Efficient large-scale training, section 2.2).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from xverse.errors import XverseError
from xverse.model.cache import KV
from xverse.model.decoder import Decoder
from xverse.model.shape import ModelShape
from xverse.parallel.grid import Grid


class Inputs(NamedTuple):
    """What a stage needs of a pass besides the tokens: positions [T], and the KV door."""

    positions: Tensor
    kv: KV


class Stage(nn.Module):
    """Some blocks of a decoder, which still is what names and holds their weights."""

    def __init__(self, decoder: Decoder, layers: Sequence[int], *, first: bool, last: bool) -> None:
        super().__init__()
        self.embed_tokens = decoder.model.embed_tokens if first else None
        self.blocks = nn.ModuleList(decoder.model.layers.get_submodule(str(n)) for n in layers)
        self.norm = decoder.model.norm if last else None
        self.head = decoder.lm_head if last else None  # used by the loss, gathered with the stage
        self.dtype, self.hidden = decoder.dtype, decoder.shape.hidden_size
        self.turns = decoder.turns
        self.given: Sequence[Inputs] = ()

    def example(self, tokens: tuple[int, int], *, entering: bool) -> Tensor:
        """What goes in or comes out in a pass, without its numbers; as Pipeline has `tokens`."""
        at_end = (self.embed_tokens if entering else self.norm) is not None
        count = tokens[0] if at_end else tokens[1]
        if entering and at_end:
            return torch.empty(count, dtype=torch.int64, device="meta")
        hidden = torch.empty(count, self.hidden, dtype=self.dtype, device="meta")
        return hidden.requires_grad_()

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """Of pass `number` [1]: ids [T] on the first stage, else hidden states [T, D]."""
        given = self.given[int(number)]
        x_TD: Tensor = x if self.embed_tokens is None else self.embed_tokens(x)
        cos_TE, sin_TE = self.turns(given.positions, given.kv, self.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, cos_TE, sin_TE, given.kv)
        if self.norm is not None:
            x_TD = self.norm(x_TD)
        return x_TD


def cut_layers(shape: ModelShape, stages: int, row_tokens: int) -> list[range]:
    """Which layers each stage has, so that the slowest is as fast as can be.

    A block costs its products and its attention over rows of `row_tokens`; the last stage has the
    head, too. XverseError where there are more stages than layers.
    """
    layers = shape.num_hidden_layers
    if stages > layers:
        raise XverseError(
            f"{layers} layers cannot be cut into {stages} stages.",
            "pipeline * interleave in [mesh] is the number of stages, each of one layer or more.",
            "Take fewer.",
        )
    tables = shape.vocab_size * shape.hidden_size
    blocks = shape.num_active_parameters - tables * (1 if shape.tie_word_embeddings else 2)
    # Two products with keys and values, of which causal attention needs half.
    attention = shape.num_attention_heads * shape.head_dim * row_tokens
    block = blocks / layers + attention
    # Layers of the last stage, so many that none of the others has to take longer than needed.
    costs = {
        last: max(last * block + tables, -(-(layers - last) // max(1, stages - 1)) * block)
        for last in range(1, layers - stages + 2)
    }
    last = min(costs, key=lambda last: (costs[last], -last)) if stages > 1 else layers
    counts = [(layers - last + place) // (stages - 1) for place in range(stages - 1)] + [last]
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def spread_layers(decoder: Decoder, grid: Grid, row_tokens: int) -> Decoder:
    """Keep the layers of this rank's stages, in place; see `stages_of`.

    Stage s is on the rank at place s % n of `pipeline`. XverseError where it cannot be cut.
    """
    size, place = grid.size("pipeline"), grid.place("pipeline")
    if size == 1:
        return decoder
    if decoder.shape.tie_word_embeddings:
        raise XverseError(
            "A model whose head is its embedding cannot be trained with a pipeline.",
            "Both ends of the pipeline would have the same weight (tie_word_embeddings).",
            "Set pipeline to 1 in [mesh], or take a shape whose head is its own.",
        )
    cuts = cut_layers(decoder.shape, size * grid.axes.interleave, row_tokens)
    mine = range(place, len(cuts), size)
    stages = tuple(
        Stage(decoder, cuts[number], first=number == 0, last=number == len(cuts) - 1)
        for number in mine
    )
    kept = {layer for number in mine for layer in cuts[number]}
    for layer in set(range(decoder.shape.num_hidden_layers)) - kept:
        delattr(decoder.model.layers, str(layer))  # the others keep their numbers
    if 0 not in mine:
        decoder.model.embed_tokens.weight = _nothing(decoder)
    if len(cuts) - 1 not in mine:
        decoder.model.norm.weight = _nothing(decoder)
        decoder.lm_head = None
    vars(decoder)["stages"] = stages  # no module of it: their weights are the decoder's already
    return decoder


def stages_of(decoder: Decoder) -> tuple[Stage, ...]:
    """What `spread_layers` has cut it into; none where this rank has all layers."""
    found: tuple[Stage, ...] = vars(decoder).get("stages", ())
    return found


class Pipeline:
    """The stages of this rank with their schedule, for steps of `passes` passes.

    `loss` is asked for on the rank of the last stage, with its output [T, D] and the pass's number.
    `tokens` of a pass: how many go in and come out, and how many each rank has between stages.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        grid: Grid,
        loss: Callable[[Tensor, int], Tensor],
        *,
        passes: int,
        tokens: tuple[int, int],
    ) -> None:
        size, place = grid.size("pipeline"), grid.place("pipeline")
        rounds = max(1, passes // size)
        if passes % rounds:
            raise XverseError(
                f"{passes} passes cannot go through a pipeline of {size} devices.",
                f"They go in {rounds} rounds, all of equally many passes.",
                f"Take rows_per_step so that a device has a multiple of {size} passes in a step.",
            )
        self.stages, self.passes, self.loss = stages, passes, loss
        self.first, self.last = place == 0, place == size - 1
        self._device = grid.ranks.device
        held = [
            PipelineStage(
                stage,
                place + size * turn,
                size * len(stages),
                self._device,
                input_args=stage.example(tokens, entering=True),
                output_args=stage.example(tokens, entering=False),
                group=grid.group("pipeline"),
            )
            for turn, stage in enumerate(stages)
        ]
        # Gradients are sums (decision 0024).
        options: dict[str, Any] = {
            "n_microbatches": passes,
            "loss_fn": self._scored,
            "scale_grads": False,
        }
        self._schedule: Schedule1F1B | ScheduleInterleaved1F1B = (
            ScheduleInterleaved1F1B(held, **options)
            if len(held) > 1
            else Schedule1F1B(held[0], **options)
        )

    def run(self, ids: Sequence[Tensor], given: Sequence[Inputs], *, learn: bool) -> None:
        """All passes of a step forward and, to `learn`, backward; gradients are added."""
        assert len(ids) == len(given) == self.passes
        for stage in self.stages:
            stage.given = given
        number = torch.arange(self.passes)
        call: Callable[..., Any] = self._schedule.step if learn else self._schedule.eval
        call(
            *([torch.cat(list(ids))] if self.first else []),
            number=number,
            **({"target": number} if self.last else {}),
            **({"return_outputs": False} if learn else {}),
        )

    def _scored(self, x_TD: Tensor, number: Tensor) -> Tensor:
        return self.loss(x_TD, int(number))


def _nothing(decoder: Decoder) -> nn.Parameter:
    """In the place of a weight that another stage has: of the same dtype and device."""
    return nn.Parameter(
        torch.empty(0, dtype=decoder.dtype, device=decoder.device), requires_grad=False
    )
