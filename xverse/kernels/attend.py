"""Q, K, V -> MIXED V. Causal attention: one sequence, many by their lengths, many in pages."""

import torch
from torch import Tensor
from torch.nn import functional


def attend_sequence(q_THE: Tensor, k_KSE: Tensor, v_KSE: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens of one sequence. -> [T, H, E].

    Twin: `reference.attend`, which takes k and v as [S, K, E].
    """
    tokens, seen = q_THE.shape[0], k_KSE.shape[1]
    mask = None
    if 1 < tokens < seen:
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q_THE.device).tril(seen - tokens)
    mixed = functional.scaled_dot_product_attention(
        q_THE.transpose(0, 1)[None],
        k_KSE[None],
        v_KSE[None],
        attn_mask=mask,
        is_causal=tokens == seen and tokens > 1,
        enable_gqa=q_THE.shape[1] != k_KSE.shape[0],
    )
    return mixed[0].transpose(0, 1)


def attend_batch(q_BHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_BS: Tensor) -> Tensor:
    """One new token of each of B sequences against its own past; False in the mask is not seen.

    -> [B, H, E].
    """
    mixed = functional.scaled_dot_product_attention(
        q_BHE[:, :, None],
        k_BKSE,
        v_BKSE,
        attn_mask=mask_BS[:, None, None],
        enable_gqa=q_BHE.shape[1] != k_BKSE.shape[1],
    )
    return mixed[:, :, 0]


def gather_pages(pages_PKSE: Tensor, tables_BP: Tensor) -> Tensor:
    """The pages of B sequences, each sequence's one after another: a copy [B, K, P * S, E]."""
    _, heads, size, width = pages_PKSE.shape
    sequences, pages = tables_BP.shape
    # Rows of S * E numbers are copied whole; indexing pages and turning them copies twice.
    rows_BKP = tables_BP[:, None] * heads + torch.arange(heads, device=tables_BP.device)[:, None]
    rows = pages_PKSE.flatten(0, 1).flatten(1).index_select(0, rows_BKP.flatten())
    return rows.view(sequences, heads, pages * size, width)


def attend_pages(
    q_BHE: Tensor, keys_PKSE: Tensor, values_PKSE: Tensor, tables_BP: Tensor, lengths_B: Tensor
) -> Tensor:
    """One new token of each of B sequences against its past in pages. -> [B, H, E].

    Twin: `reference.attend_pages`. Every sequence costs as much as the longest. A single table is
    that of all: tokens of one sequence that see more and more of it.
    """
    k_BKSE, v_BKSE = (
        gather_pages(pages, tables_BP).expand(len(lengths_B), -1, -1, -1)
        for pages in (keys_PKSE, values_PKSE)
    )
    seen = torch.arange(k_BKSE.shape[2], device=q_BHE.device)
    mask_BS = seen < lengths_B[:, None]
    return attend_batch(q_BHE, k_BKSE, v_BKSE, mask_BS)
