"""THE SPECIFICATION. Every operation of the models, as plain PyTorch and nothing else.

Letters in names, through the whole package: B sequence in a batch, T token, D hidden, H query head,
K key/value head, E head size, F feed-forward, V vocabulary, X expert, P page, S token in a page or
in what was seen. `q_THE` is a tensor [tokens, query heads, head size].
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Scales = tuple[Tensor, Tensor]  # of FP8 keys and of values, [P, K, S] bf16: one a token and head
FP8_LARGEST = 448.0  # of float8_e4m3fn
SCALE_LEAST = 2.0**-100  # of a row of zeros; its inverse is finite


class Norm(NamedTuple):
    """An RMSNorm that an operation applies to its input first; see `rms_norm`."""

    weight_D: Tensor
    eps: float
    weight_in_fp32: bool


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    weight_in_fp32: bool,
) -> Tensor:
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


def swiglu_joined(joined_TF2: Tensor) -> Tensor:
    """`swiglu` of gate and up as one projection gives them, gate first. [T, 2F] -> [T, F]."""
    return swiglu(*joined_TF2.chunk(2, dim=-1))


def add_norm(x_TD: Tensor, residual_TD: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The residual stream with x added, rounded, and its RMSNorm; without one, x and its norm."""
    sum_TD = x_TD if residual_TD is None else residual_TD + x_TD
    return sum_TD, rms_norm(sum_TD, norm.weight_D, norm.eps, weight_in_fp32=norm.weight_in_fp32)


def embed_rows(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """Rows `ids` of the table, [T, D]."""
    return functional.embedding(ids_T, table_VD)


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


def quantize_kv(x_TKE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of keys or values as FP8, and what to multiply each by. -> [T, K, E], [T, K] bf16.

    The largest element becomes 448, the largest of e4m3; the scale is rounded up to bf16, so that
    nothing is cut off. A row of zeros stays one.
    """
    x = x_TKE.float()
    # Rounded up in the bits: what is above a bf16 number carries into its last place.
    bits_TK = (x.abs().amax(-1) * (1 / FP8_LARGEST)).clamp_min(SCALE_LEAST).view(torch.int32)
    scale_TK = ((bits_TK + 0xFFFF) & -0x10000).view(torch.float32)
    fp8_TKE = (x * (1 / scale_TK)[..., None]).to(torch.float8_e4m3fn)
    return fp8_TKE, scale_TK.bfloat16()


def dequantize_kv(fp8_TKE: Tensor, scale_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize_kv` stored, rounded to `dtype`; any leading dimensions."""
    return (fp8_TKE.float() * scale_TK.float()[..., None]).to(dtype)


def attend_pages(
    q_BHE: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    tables_BP: Tensor,
    lengths_B: Tensor,
    scales: Scales | None = None,
) -> Tensor:
    """One new token of each of B sequences against its past in pages of S tokens. -> [B, H, E].

    Page i of sequence b is `tables[b, i]`; of all its pages the first `lengths[b]` tokens count,
    the new one the last of them. Paged attention, Kwon et al. 2023. With `scales`, pages are FP8.
    """
    ends = range(len(q_BHE) + 1)
    return _attend_parts(
        q_BHE, keys_PKSE, values_PKSE, tables_BP, list(ends), lengths_B.tolist(), scales
    )


def attend_chunks(
    q_THE: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    tables_BP: Tensor,
    offsets_B1: Tensor,
    held_B: Tensor,
    scales: Scales | None = None,
    *,
    most: int | None = None,
) -> Tensor:
    """Chunks of B sequences, causal, each against its past and itself in pages. -> [T, H, E].

    Rows `offsets[b]` to `offsets[b + 1]` are tokens `held[b]`, `held[b] + 1`, ... of sequence b;
    all are stored already. Rows past the last offset give zeros. `most`, the largest count, only
    helps kernels choose. With `scales`, pages are FP8.
    """
    offsets, held = offsets_B1.tolist(), held_B.tolist()
    counts = [stop - start for start, stop in pairwise(offsets)]
    seen = [past + count for past, count in zip(held, counts, strict=True)]
    mixed = _attend_parts(q_THE, keys_PKSE, values_PKSE, tables_BP, offsets, seen, scales)
    return torch.cat((mixed, torch.zeros_like(q_THE[offsets[-1] :])))


def _attend_parts(
    q_THE: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    tables_BP: Tensor,
    offsets: Sequence[int],
    seen: Sequence[int],
    scales: Scales | None,
) -> Tensor:
    """The last rows of each sequence of `seen` tokens, joined. -> [offsets[-1], H, E]."""
    mixed = [q_THE[:0]]
    for (start, stop), table_P, tokens in zip(pairwise(offsets), tables_BP, seen, strict=True):
        used_P = table_P[: -(-tokens // keys_PKSE.shape[2])].long()
        rows = [keys_PKSE[used_P], values_PKSE[used_P]]
        if scales is not None:
            pairs = zip(rows, scales, strict=True)
            rows = [dequantize_kv(fp8, scale[used_P], q_THE.dtype) for fp8, scale in pairs]
        k_SKE, v_SKE = (row.transpose(1, 2).flatten(0, 1)[:tokens] for row in rows)
        mixed.append(attend(q_THE[start:stop], k_SKE, v_SKE))
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

    First RMSNorm of x, if given, see `rms_norm`; the sum in fp32, rounded; the bias added; if
    `gated`, the upper half of the outputs is gate and the lower is up, and SwiGLU leaves [T, N/2];
    then the residual added. Each step rounds to x's dtype, as the plain decoder does.
    """
    if norm is not None:
        weight_D, eps, in_fp32 = norm
        x_TD = rms_norm(x_TD, weight_D, eps, weight_in_fp32=in_fp32)
    y_TN = functional.linear(x_TD, weight_ND, bias_N)
    if gated:
        y_TN = swiglu_joined(y_TN)
    return y_TN if residual_TN is None else residual_TN + y_TN


def rotate_store(
    qkv_TN: Tensor,
    cos_SE: Tensor,
    sin_SE: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    scales: Scales | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Rope on q and k of each token, k and v into their pages. -> q, rotated, [T, H, E].

    `qkv_TN` holds q, k, v of each token one after another, as the joint projection gives them;
    `positions_T` are rows of the rope tables, `slots_T` page * S + slot. With `scales`, two tensors
    [P, K, S] in bf16, the pages are FP8, and each row is stored as `quantize_kv` gives it. With
    `in_place`, q and k in `qkv_TN` are rotated too, and q is a view of it.
    """
    _, kv_heads, page_size, size = keys_PKSE.shape
    heads = qkv_TN.shape[1] // size - 2 * kv_heads
    qkv = qkv_TN.unflatten(-1, (-1, size))
    qk, v_TKE = qkv.split((heads + kv_heads, kv_heads), dim=1)
    rotated = rotate(qk, cos_SE[positions_T], sin_SE[positions_T])
    q_THE, k_TKE = rotated.split((heads, kv_heads), dim=1)
    page_T, slot_T = slots_T // page_size, slots_T % page_size
    for index, (pages, new) in enumerate(((keys_PKSE, k_TKE), (values_PKSE, v_TKE))):
        if scales is None:
            pages[page_T, :, slot_T] = new
        else:
            fp8, scale_TK = quantize_kv(new)
            pages.view(torch.uint8)[page_T, :, slot_T] = fp8.view(torch.uint8)
            scales[index][page_T, :, slot_T] = scale_TK
    if in_place:
        qk.copy_(rotated)
        return qk[:, :heads]
    return q_THE.contiguous()


def rotate_store_attend(
    qkv_TN: Tensor,
    cos_SE: Tensor,
    sin_SE: Tensor,
    positions_T: Tensor,
    pages_TP: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    scales: Scales | None = None,
) -> Tensor:
    """Decode attention: one new token of each of T sequences, over a paged cache. -> [T, H * E].

    `rotate_store` at place `positions_T` of each sequence's pages, which `pages_TP` lists in order,
    and then `attend_pages` over what the sequence holds by then.
    """
    page_size = keys_PKSE.shape[2]
    places_T1 = positions_T.long()[:, None]
    page_T = pages_TP.long().gather(1, places_T1 // page_size)[:, 0]
    slots_T = page_T * page_size + positions_T % page_size
    pools = (keys_PKSE, values_PKSE, scales)
    q_THE = rotate_store(qkv_TN, cos_SE, sin_SE, positions_T, slots_T, *pools)
    return attend_pages(q_THE, keys_PKSE, values_PKSE, pages_TP, positions_T + 1, scales).flatten(1)


def add_parts(parts_NTD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
    """What N ranks computed, added: in fp32 and in the order of the ranks, so that all of them get
    the same bits; rounded to the parts' dtype, and the residual added after that. -> [T, D]."""
    total = parts_NTD[0].float()
    for part in parts_NTD[1:]:
        total = total + part.float()
    y_TD = total.to(parts_NTD.dtype)
    return y_TD if residual_TD is None else residual_TD + y_TD


def gather_columns(parts_NTC: Tensor, columns: int) -> Tensor:
    """The columns of N ranks side by side, as far as there are any. -> [T, columns]."""
    return torch.cat(list(parts_NTC), dim=1)[:, :columns]


def route(x_TD: Tensor, router_XD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The published XVERSE router: which experts, and how much of each.

    Scores and softmax in fp32 over all experts, the best `top_k` kept, renormalised by their sum
    plus 1e-6. Returns weights [T, top_k] in x's dtype and expert numbers [T, top_k] (int64).
    """
    scores_TX = functional.linear(x_TD.float(), router_XD.float()).softmax(-1)
    weights, experts = scores_TX.topk(top_k, dim=-1)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)).to(x_TD.dtype), experts
