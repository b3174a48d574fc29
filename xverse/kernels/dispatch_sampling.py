"""WHICH ARITHMETIC CHOOSES TOKENS, AND WHY. As `dispatch`, for what follows the logits."""

from functools import partial

import torch

from xverse.kernels import reference_sample
from xverse.kernels.choice import Choice, plain, why_no_triton

ANY_LOGITS = "logits of any dtype on CUDA"


def best_rows(device: torch.device, rows: int = 1, vocab_size: int = 1) -> Choice:
    """The function in the place of `reference_sample.best_rows`, for up to `rows` rows.

    This and `sample_rows` hold memory of their own: one for each stream that chooses.
    """
    operation = "greedy choice of tokens"
    why_not = why_no_triton(device, torch.bfloat16)
    if why_not:
        return plain(operation, reference_sample.best_rows, device, why_not)
    from xverse.kernels import sample_triton

    scratch = sample_triton.Scratch.reserve(rows, vocab_size, device, greedy=True)
    call = partial(sample_triton.best_rows, scratch=scratch)
    return Choice(operation, "Triton, one launch, several programs a row", ANY_LOGITS, call)


def sample_rows(device: torch.device, rows: int = 1, vocab_size: int = 1) -> Choice:
    """The function in the place of `reference_sample.sample_rows`, for up to `rows` rows."""
    operation = "choice of tokens by options"
    why_not = why_no_triton(device, torch.bfloat16)
    if why_not:
        return plain(operation, reference_sample.sample_rows, device, why_not)
    from xverse.kernels import sample_triton

    scratch = sample_triton.Scratch.reserve(rows, vocab_size, device)
    call = partial(sample_triton.sample_rows, scratch=scratch)
    return Choice(operation, "Triton, without sorting and without the host", ANY_LOGITS, call)


def mask_rows(device: torch.device) -> Choice:
    """The function in the place of `reference_sample.mask_rows`."""
    return _change("mask of allowed tokens", "mask_rows", device)


def penalize_rows(device: torch.device) -> Choice:
    """The function in the place of `reference_sample.penalize_rows`."""
    return _change("penalties of tokens", "penalize_rows", device)


def count_rows(device: torch.device) -> Choice:
    """The function in the place of `reference_sample.count_rows`."""
    return _change("count of tokens", "count_rows", device)


def _change(operation: str, name: str, device: torch.device) -> Choice:
    why_not = why_no_triton(device, torch.bfloat16)
    if why_not:
        return plain(operation, getattr(reference_sample, name), device, why_not)
    from xverse.kernels import change_triton

    call = getattr(change_triton, name)
    return Choice(operation, "Triton, in place, only what changes", ANY_LOGITS, call)
