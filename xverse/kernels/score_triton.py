"""LOGITS -> LOSS AND GRADIENT, IN PLACE. Cross-entropy on a GPU: a program a row, read twice.

Both readings of a row are close together, so that the second one comes from the cache: memory sees
each logit read once and its gradient written once, where the logit was.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # columns at a time
WARPS = 16  # few programs at once: 264 rows of 100,534 logits in bf16 are about the L2 of an H200


def score_logits(
    logits_TV: Tensor, targets_T: Tensor, mask_T: Tensor, z_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin: `reference_train.score_logits`; the gradient takes the place of the logits.

    Rows may stand apart in memory; what lies between them is overwritten.
    """
    rows, columns = logits_TV.shape
    assert logits_TV.stride(1) == 1
    assert targets_T.is_contiguous()
    assert mask_T.is_contiguous()
    loss_T, z_T = torch.empty((2, rows), dtype=torch.float32, device=logits_TV.device)
    if rows:
        _score[(rows,)](
            logits_TV, targets_T, mask_T, loss_T, z_T, columns, _readable(logits_TV),
            logits_TV.stride(0), float(z_factor), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return loss_T.sum(), z_T.sum(), logits_TV


def _readable(logits_TV: Tensor) -> int:
    """Columns of a row with the padding behind it, if the last row has it too: of a round number
    of columns a thread takes 16 bytes at a time, of 100,534 it takes 2."""
    rows, columns = logits_TV.shape
    apart = logits_TV.stride(0)
    held = logits_TV.untyped_storage().nbytes() // logits_TV.element_size()
    return apart if logits_TV.storage_offset() + rows * apart <= held else columns


@triton.jit(do_not_specialize=["z_factor"])
def _score(
    logits, targets, mask, losses, squares, columns, readable, apart, z_factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * apart
    target = tl.load(targets + row)
    counts = tl.load(mask + row) != 0
    column = tl.arange(0, BLOCK)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + column
        x = tl.load(logits + at, at < readable, 0.0).to(tl.float32)
        x = tl.where(at < columns, x, float("-inf"))
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    lse = highest + tl.log(total)
    picked = tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, tl.where(counts, lse - picked, 0.0))
    tl.store(squares + row, tl.where(counts, lse * lse, 0.0))
    share = tl.where(counts, 1 + 2 * z_factor * lse, 0.0)
    hit = tl.where(counts, 1.0, 0.0)
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    for start in range(0, columns, BLOCK):
        at = start + column
        x = tl.load(logits + at, at < readable, 0.0).to(tl.float32)
        gradient = tl.exp(x - lse) * share - tl.where(at == target, hit, 0.0)
        gradient = tl.where(at < columns, gradient, 0.0)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), at < readable)
