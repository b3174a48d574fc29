"""IDS -> IDS, the plain way. Decoding of a few prompts side by side, one slab of memory each.

The specification of decoding: whatever is faster must give the same tokens as this.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence

import torch

from xverse.engine.request import Finish, Sampling, Token
from xverse.engine.sampler import Sampler
from xverse.model.cache import Growing
from xverse.model.decoder import Decoder


@torch.inference_mode()
def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    end_ids: Collection[int] = (),
    ended: Collection[int] = (),
) -> Iterator[Token]:
    """Yield the tokens of every prompt, step by step, each as soon as it is known.

    Samplings must be filled and have max_tokens above 0. A prompt ends after a token of `end_ids`,
    which is yielded too, or at max_tokens, or when the reader has put its number into `ended`.
    """
    seen = [list(prompt) for prompt in prompts]
    samplers = [Sampler(sampling, end_ids) for sampling in samplings]
    limits = [len(ids) + (s.max_tokens or 0) for ids, s in zip(seen, samplings, strict=True)]
    device = decoder.device
    kv = Growing(decoder.shape, len(seen), dtype=decoder.dtype, device=device)
    # Prompts one by one, then a step for all: each is computed as it would be alone.
    coming = deque({row: ids} for row, ids in enumerate(seen))
    new: dict[int, list[int]] = {}  # what each prompt that goes on brings next
    while coming or new:
        step = coming.popleft() if coming else new
        ids = torch.tensor([id for fresh in step.values() for id in fresh], device=device)
        counts = [len(step.get(row, ())) for row in range(len(seen))]
        last = torch.tensor([len(fresh) for fresh in step.values()], device=device).cumsum(0) - 1
        logits_BV = decoder(ids, kv.extend(counts), kv, last)
        for row, logits_V in zip(list(step), logits_BV, strict=True):
            chosen = samplers[row].choose(logits_V, seen[row], len(prompts[row]))
            seen[row].append(chosen)
            finish: Finish | None = None
            ends = chosen in end_ids and not samplings[row].ignore_eos
            if ends or chosen in samplings[row].stop_ids:
                finish = "stop"
            elif len(seen[row]) == limits[row]:
                finish = "length"
            if finish is None:
                new[row] = [chosen]
            else:
                new.pop(row, None)
            yield Token(row, chosen, finish)
        for row in ended:
            new.pop(row, None)
