"""Q, K, V -> MIXED V. Causal attention of one sequence, and of many by their lengths."""

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
