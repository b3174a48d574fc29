"""THE SPECIFICATION. Every operation of the models, as plain PyTorch and nothing else.

Letters in names, through the whole package: B sequence in a batch, T token, D hidden, H query head,
K key/value head, E head size, F feed-forward, V vocabulary, X expert, P page, S token in a page or
in what was seen. `q_THE` is a tensor [tokens, query heads, head size].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Norm(NamedTuple):
    """An RMSNorm that an operation applies to its input first; see `rms_norm`."""

    weight_D: Tensor
    eps: float
    weight_in_fp32: bool


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
    the new one the last of them. A single table is that of all B.
    Paged attention, Kwon et al. 2023.
    """
    mixed = []
    tables_BP = tables_BP.expand(len(q_BHE), -1)
    for q_HE, table_P, length in zip(q_BHE, tables_BP, lengths_B.tolist(), strict=True):
        k_SKE, v_SKE = (
            pages[table_P].transpose(1, 2).flatten(0, 1)[:length]
            for pages in (keys_PKSE, values_PKSE)
        )
        mixed.append(attend(q_HE[None], k_SKE, v_SKE))
    return torch.cat(mixed)


def multiply_rows(
    x_TD: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x @ weight.T of a few tokens, with what stands before and after it in a block. -> [T, N].

    First RMSNorm of x, if given; the sum in fp32, rounded; the bias added; if `gated`, the upper
    half of the outputs is gate and the lower is up, and SwiGLU leaves [T, N/2]; then the residual
    added. Each step rounds to x's dtype, as the plain decoder does.
    """
    if norm is not None:
        x_TD = rms_norm(x_TD, norm.weight_D, norm.eps, weight_in_fp32=norm.weight_in_fp32)
    y_TN = functional.linear(x_TD, weight_ND, bias_N)
    if gated:
        y_TN = swiglu(*y_TN.chunk(2, dim=-1))
    return y_TN if residual_TN is None else residual_TN + y_TN


def rotate_store_attend(
    qkv_TN: Tensor,
    cos_SE: Tensor,
    sin_SE: Tensor,
    positions_T: Tensor,
    pages_TP: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
) -> Tensor:
    """Decode attention: one new token of each of T sequences, over a paged cache. -> [T, H * E].

    `qkv_TN` holds q, k, v of each token one after another, as the joint projection gives them.
    Rotates q and k by row `positions_T` of the tables, stores k and v at that place of the
    sequence's pages (`pages_TP` lists them in order), and mixes what the sequence holds by then.
    """
    _, kv_heads, page_size, size = keys_PKSE.shape
    heads = qkv_TN.shape[1] // size - 2 * kv_heads
    qkv = qkv_TN.unflatten(-1, (-1, size))
    qk, v_TKE = qkv.split((heads + kv_heads, kv_heads), dim=1)
    rotated = rotate(qk, cos_SE[positions_T], sin_SE[positions_T])
    q_THE, k_TKE = rotated.split((heads, kv_heads), dim=1)
    tables_TP = pages_TP.long()
    page_T = tables_TP.gather(1, positions_T.long()[:, None] // page_size)[:, 0]
    keys_PKSE[page_T, :, positions_T % page_size] = k_TKE
    values_PKSE[page_T, :, positions_T % page_size] = v_TKE
    return attend_pages(q_THE, keys_PKSE, values_PKSE, tables_TP, positions_T + 1).flatten(1)


def route(x_TD: Tensor, router_XD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The published XVERSE router: which experts, and how much of each.

    Scores and softmax in fp32 over all experts, the best `top_k` kept, renormalised by their sum
    plus 1e-6. Returns weights [T, top_k] in x's dtype and expert numbers [T, top_k] (int64).
    """
    scores_TX = functional.linear(x_TD.float(), router_XD.float()).softmax(-1)
    weights, experts = scores_TX.topk(top_k, dim=-1)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)).to(x_TD.dtype), experts
