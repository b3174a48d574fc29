"""ENGINE = PLAIN PATH? Greedy ids of the engine beside the plain decoder's, before any timing."""

from dataclasses import dataclass

import torch

from xverse.engine.engine import Engine
from xverse.engine.measure import measure_latency
from xverse.engine.request import Request
from xverse.engine.simple import decode
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder

# Two ways to sum the same products in 16 bits leave logits about 8 rounding steps apart at 7B's
# depth. A token whose logit is within twice that of the best is as good a choice as the best;
# among 100,000 random logits about a dozen are that close.
ROUNDING_STEPS = 16


@dataclass(frozen=True)
class Agreement:
    """What the engine and the plain decoder say to one prompt.

    `ties`: tokens of the engine that are not the plain decoder's choice after the same ids, but
    within rounding of it; `wrong`: those that are not even that.
    """

    request: Request
    ids: tuple[int, ...]
    plain_ids: tuple[int, ...]
    ties: int = 0
    wrong: int = 0

    @property
    def sound(self) -> bool:
        """Whether the engine computes what the plain decoder computes."""
        return self.wrong == 0

    def __str__(self) -> str:
        count = len(self.ids)
        if self.ids == self.plain_ids:
            return f"all {count} greedy ids equal those of the plain decoder"
        if self.sound:
            return (
                f"greedy ids equal the plain decoder's but for rounding: {self.ties} of {count} "
                "tokens were near ties"
            )
        return (
            f"WRONG ANSWERS: {self.wrong} of {count} greedy ids are not the plain decoder's, "
            "and not by rounding"
        )


def compare(engine: Engine, request: Request, *, rounding_steps: int = ROUNDING_STEPS) -> Agreement:
    """Let the engine answer a greedy request alone, and judge its ids."""
    ids = measure_latency(engine, [request]).answers[0].ids
    return judge(engine.decoder, request, ids, rounding_steps=rounding_steps)


@torch.inference_mode()
def judge(
    decoder: Decoder,
    request: Request,
    ids: tuple[int, ...],
    *,
    rounding_steps: int = ROUNDING_STEPS,
) -> Agreement:
    """The ids that an engine gave to a greedy request, beside those of `engine/simple.py`.

    Where they part, each of them is looked at in the plain decoder's logits after those before it.
    """
    assert request.sampling is not None, "it decodes"
    assert request.sampling.temperature == 0.0, "it is greedy"
    plain = tuple(token.id for token in decode(decoder, [request.ids], [request.sampling]))
    if ids == plain:
        return Agreement(request, ids, plain)
    device, first = decoder.device, len(request.ids) - 1
    row = [*request.ids, *ids[:-1]]
    kv = Packed([len(row)], device)
    wanted = torch.arange(first, len(row), device=device)
    logits_TV = decoder(torch.tensor(row, device=device), kv.positions(), kv, wanted).float()
    chosen_T = logits_TV.gather(1, torch.tensor(ids, device=device)[:, None])[:, 0]
    behind_T = logits_TV.amax(-1) - chosen_T
    allowed_T = rounding_steps * torch.finfo(decoder.dtype).eps * logits_TV.abs().amax(-1)
    wrong = int((~(behind_T <= allowed_T)).sum())  # NaN is wrong, too
    ties = int(((behind_T > 0) & (behind_T <= allowed_T)).sum())
    return Agreement(request, ids, plain, ties=ties, wrong=wrong)
