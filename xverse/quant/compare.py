"""TWO MODELS, ONE TEXT -> HOW FAR APART. What quantization has cost, token by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.quant.passage import Passage

ROWS = 256  # of logits at a time: 100 MB of each model at a vocabulary of 100,000


@dataclass(frozen=True)
class Quality:
    """The quantized model beside its source on the same text.

    `kl_divergence`: mean of KL(source || quantized) over tokens, in nats. `top1_agreement`: the
    share of tokens for which both hold the same next one to be the likeliest.
    """

    tokens: int
    perplexity_source: float
    perplexity: float
    kl_divergence: float
    top1_agreement: float

    @property
    def loss(self) -> float:
        """By how much the perplexity has risen: 0.01 is one per cent."""
        return self.perplexity / self.perplexity_source - 1


@torch.no_grad()
def compare(source: Passage, quantized: Passage) -> Quality:
    """Both passages have the same samples, and have passed all blocks. The first token of each
    sample is not predicted."""
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for number, ids in enumerate(source.samples):
        next_T = torch.tensor(ids[1:], device=source.device)
        xs = [passage.final(number)[:-1].split(ROWS) for passage in (source, quantized)]
        for ids_T, x_TD, y_TD in zip(next_T.split(ROWS), *xs, strict=True):
            wanted_TV = source.decoder.logits(x_TD).float().log_softmax(-1)
            got_TV = quantized.decoder.logits(y_TD).float().log_softmax(-1)
            sums += _sums(wanted_TV, got_TV, ids_T).cpu()
            tokens += len(ids_T)
    before, after, divergence, same = (sums / max(tokens, 1)).tolist()
    exp = torch.tensor([before, after], dtype=torch.float64).exp().tolist()
    return Quality(tokens, exp[0], exp[1], divergence, same)


def _sums(wanted_TV: Tensor, got_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Negative log-likelihoods by both, divergence and agreement, summed, [4] fp64."""
    surprise = [-x.gather(1, ids_T[:, None]).double().sum() for x in (wanted_TV, got_TV)]
    divergence = (wanted_TV.exp() * (wanted_TV - got_TV)).sum(-1).double().sum()
    same = (wanted_TV.argmax(-1) == got_TV.argmax(-1)).double().sum()
    return torch.stack([*surprise, divergence, same])
