"""Q, K, V -> MIXED V. Rope, and attention of decoding sequences over pages, compiled for a CPU."""

import ctypes

import torch
from torch import Tensor

from xverse.errors import XverseError
from xverse.kernels import native


def rotate_heads(qkv_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, heads: int) -> Tensor:
    """Rotate the first heads of every row in place. Twin: `reference.rotate`.

    Contiguous, in one dtype of `native.FLOATS`.
    """
    tokens, all_heads, size = qkv_THE.shape
    assert qkv_THE.is_contiguous(), "it is turned in place"
    assert cos_TE.dtype == sin_TE.dtype == qkv_THE.dtype, "one dtype"
    assert cos_TE.shape == sin_TE.shape == (tokens, size)
    native.loaded().rotate(
        qkv_THE.data_ptr(),
        cos_TE.contiguous().data_ptr(),
        sin_TE.contiguous().data_ptr(),
        tokens,
        all_heads * size,
        heads,
        size,
        native.FLOATS[qkv_THE.dtype],
        torch.get_num_threads(),
    )
    return qkv_THE


def store_attend(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    tables_TP: Tensor,
    lengths_T: Tensor,
) -> Tensor:
    """Keep each row's key and value, the last of its `lengths`, and attend over its pages.

    -> [T, H, E]. All keys are kept before any row attends, so rows may be neighbours of one
    sequence. Twins: `reference.store_pages` and `reference.attend_pages`. Tables and lengths int64.
    """
    tokens, heads, size = q_THE.shape
    _, kv_heads, page, _ = keys_PKSE.shape
    assert all(side.is_contiguous() for side in (keys_PKSE, values_PKSE, tables_TP, lengths_T))
    assert tables_TP.dtype == lengths_T.dtype == torch.int64, "as the library reads them"
    assert q_THE.dtype == keys_PKSE.dtype == values_PKSE.dtype, "one dtype"
    sides = [
        side if side.stride()[1:] == (size, 1) else side.contiguous()
        for side in (q_THE, k_TKE, v_TKE)
    ]
    mixed_THE = q_THE.new_empty(tokens, heads, size)
    about = native.Pages(
        keys_PKSE.data_ptr(),
        values_PKSE.data_ptr(),
        tables_TP.data_ptr(),
        lengths_T.data_ptr(),
        tables_TP.shape[1],
        page,
        size,
        heads,
        kv_heads,
    )
    failed = native.loaded().attend(
        ctypes.byref(about),
        *(side.data_ptr() for side in sides),
        mixed_THE.data_ptr(),
        tokens,
        *(side.stride(0) for side in sides),
        native.FLOATS[q_THE.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise XverseError(
            "There is no memory for attention.",
            f"A row of scores over {int(lengths_T.max())} tokens did not fit.",
            "Free memory, or lower kv_tokens.",
        )
    return mixed_THE
