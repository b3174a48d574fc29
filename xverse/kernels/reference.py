"""THE SPECIFICATION. Every operation of the models, as plain PyTorch and nothing else.

Letters in names, through the whole package: B sequence in a batch, T token, D hidden, H query head,
K key/value head, E head size, F feed-forward, V vocabulary, X expert, P page, S token in a page or
in what was seen. `q_THE` is a tensor [tokens, query heads, head size].
"""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, *, weight_in_fp32: bool) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, eq. 4), variance in fp32, result in x's dtype.

    `weight_in_fp32`: the dense XVERSE models multiply by the weight before rounding to x's dtype,
    Llama and the mixture-of-experts XVERSE after it.
    """
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight_in_fp32:
        return (weight_D.float() * normed).to(x_TD.dtype)
    return weight_D * normed.to(x_TD.dtype)


def rotate(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves paired: element i turns with i + E/2."""
    first, second = x_THE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_THE * cos_TE[:, None] + turned * sin_TE[:, None]


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """SwiGLU's inner product silu(gate) * up (Shazeer 2020), all in the inputs' dtype."""
    return functional.silu(gate_TF) * up_TF


def attend(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens of one sequence; softmax in fp32. -> [T, H, E]."""
    tokens, heads, size = q_THE.shape
    past = k_SKE.shape[0] - tokens
    group = heads // k_SKE.shape[1]
    k_SHE = k_SKE.repeat_interleave(group, dim=1)
    v_SHE = v_SKE.repeat_interleave(group, dim=1)
    scores_HTS = torch.einsum("the,she->hts", q_THE.float(), k_SHE.float()) / size**0.5
    future_TS = torch.ones_like(scores_HTS[0], dtype=torch.bool).triu(past + 1)
    weights_HTS = scores_HTS.masked_fill(future_TS, float("-inf")).softmax(-1).to(q_THE.dtype)
    return torch.einsum("hts,she->the", weights_HTS, v_SHE)


def attend_pages(
    q_BHE: Tensor, keys_PKSE: Tensor, values_PKSE: Tensor, tables_BP: Tensor, lengths_B: Tensor
) -> Tensor:
    """One new token of each of B sequences against its past in pages of S tokens. -> [B, H, E].

    Page i of sequence b is `tables[b, i]`; of all its pages the first `lengths[b]` tokens count,
    the new one the last of them. Paged attention, Kwon et al. 2023.
    """
    mixed = []
    for q_HE, table_P, length in zip(q_BHE, tables_BP, lengths_B.tolist(), strict=True):
        k_SKE, v_SKE = (
            pages[table_P].transpose(1, 2).flatten(0, 1)[:length]
            for pages in (keys_PKSE, values_PKSE)
        )
        mixed.append(attend(q_HE[None], k_SKE, v_SKE))
    return torch.cat(mixed)


def route(x_TD: Tensor, router_XD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The published XVERSE router: which experts, and how much of each.

    Scores and softmax in fp32 over all experts, the best `top_k` kept, renormalised by their sum
    plus 1e-6. Returns weights [T, top_k] in x's dtype and expert numbers [T, top_k] (int64).
    """
    scores_TX = functional.linear(x_TD.float(), router_XD.float()).softmax(-1)
    weights, experts = scores_TX.topk(top_k, dim=-1)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)).to(x_TD.dtype), experts
