"""Q, K, V -> MIXED V. Causal attention: one sequence, many by their lengths, many in pages."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


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


def attend_whole(q_THE: Tensor, k_SKE: Tensor, v_SKE: Tensor) -> Tensor:
    """Causal attention of one whole sequence, by cuDNN. -> [T, H, E].

    Twin: `reference.attend`. As many key as query heads, any strides. On an H200, 8,192 tokens of
    7B: 605 TFLOP/s (PyTorch's default 320, ours over pages 417). A new length costs 40 ms once.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THE, k_SKE, v_SKE))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed[0].transpose(0, 1)


def attend_documents(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Sequence[int]
) -> Tensor:
    """Causal attention of documents in a row, of these lengths, none of which sees another.

    -> [T, H, E]. Twin: `reference_train.attend_documents`. Documents of one length are a batch.
    """
    if all(length == documents[0] for length in documents):
        return _attend_equal(q_THE, k_TKE, v_TKE, len(documents))
    parts = (x.split(list(documents)) for x in (q_THE, k_TKE, v_TKE))
    return torch.cat(
        [
            attend_sequence(q, k.transpose(0, 1), v.transpose(0, 1))
            for q, k, v in zip(*parts, strict=True)
        ]
    )


def attend_offsets(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, offsets_N1: Tensor, longest: int
) -> Tensor:
    """`attend_documents` on a GPU in one launch, by flash attention over the documents' offsets.

    `offsets_N1` is int32, and no document is longer than `longest`, which need not be exact.
    """
    from torch.nn.attention.varlen import varlen_attn

    group = q_THE.shape[1] // k_TKE.shape[1]
    if group > 1:  # PyTorch 2.11 has no option for it, later ones have
        k_TKE, v_TKE = (x.repeat_interleave(group, dim=1) for x in (k_TKE, v_TKE))
    ends = (offsets_N1, offsets_N1, longest, longest)
    causal = (-1, 0)  # all that came before
    mixed = varlen_attn(q_THE, k_TKE, v_TKE, *ends, window_size=causal)
    assert isinstance(mixed, Tensor)
    return mixed


def attend_rows(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rows: int) -> Tensor:
    """Causal attention of `rows` documents of one length on a GPU, by cuDNN. -> [T, H, E].

    Forward and backward on an H200 at 490 to 550 TFLOP/s, where PyTorch's default reaches 271.
    """
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _attend_equal(q_THE, k_TKE, v_TKE, rows)


def _attend_equal(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, rows: int) -> Tensor:
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q_THE, k_TKE, v_TKE))
    grouped = q_THE.shape[1] != k_TKE.shape[1]
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(0, 1)
