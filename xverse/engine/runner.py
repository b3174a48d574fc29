"""CHUNKS -> TOKENS. One step of the decoder over what the scheduler planned, and the choices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from xverse.engine.paged import Paged, Part
from xverse.engine.scheduler import Chunk, Generation
from xverse.errors import XverseError
from xverse.model.decoder import Decoder

Choice = int | XverseError


@torch.inference_mode()
def run_step(
    decoder: Decoder, kv: Paged, chunks: Sequence[Chunk]
) -> list[tuple[Generation, Choice]]:
    """Compute the chunks. For each that is complete: its next token, or why there is none."""
    parts: list[Part] = []
    ids: list[int] = []
    last: list[int] = []  # rows whose logits choose a token
    for chunk in chunks:
        generation = chunk.generation
        assert generation.table is not None, "what runs has pages"
        parts.append(
            Part(generation.table.pages, generation.held, chunk.count, len(generation.request.ids))
        )
        ids += generation.ids[generation.held : generation.held + chunk.count]
        if chunk.complete:
            last.append(len(ids) - 1)
    ids_T = torch.tensor(ids, device=kv.device)
    hidden_TD = decoder.hidden(ids_T, kv.begin(parts), kv)
    if not last:
        return []
    logits_BV = decoder.logits(hidden_TD[torch.tensor(last, device=kv.device)])
    complete = [chunk.generation for chunk in chunks if chunk.complete]
    return list(zip(complete, choose(complete, logits_BV), strict=True))


def choose(generations: Sequence[Generation], logits_BV: Tensor) -> list[Choice]:
    """The next token of each; all that are plainly greedy in one operation."""
    greedy = [row for row, g in enumerate(generations) if g.sampler.greedy]
    choices: list[Choice] = [0] * len(generations)
    if len(greedy) > 1:
        every = len(greedy) == len(generations)
        best = (logits_BV if every else logits_BV[greedy]).max(-1)
        sound = (~best.values.isnan()).tolist()
        for row, id, is_number in zip(greedy, best.indices.tolist(), sound, strict=True):
            choices[row] = id if is_number else _one(generations[row], logits_BV[row])
    alone = range(len(generations)) if len(greedy) < 2 else set(range(len(generations))) - {*greedy}
    for row in alone:
        choices[row] = _one(generations[row], logits_BV[row])
    return choices


def _one(generation: Generation, logits_V: Tensor) -> Choice:
    try:
        return generation.sampler.choose(logits_V, generation.ids)
    except XverseError as error:  # its own misfortune: the others go on
        return error
