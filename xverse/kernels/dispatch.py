"""WHICH ARITHMETIC, AND WHY. The table from operation, device and dtype to what computes it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from xverse.kernels import (
    attend,
    attend_cpu,
    native,
    packed,
    reference,
    reference_adapt,
    reference_experts,
    reference_packed,
    reference_train,
    update_cpu,
)
from xverse.kernels.choice import PDL_SINCE, Choice, plain, why_no_triton
from xverse.kernels.cuts import Scratch
from xverse.kernels.dispatch_quantized import (
    ROWS_APART,
    add_norm_rounded,
    embed_few_bits,
    multiply_few_bits,
    multiply_steps,
    swiglu_rounded,
    widen,
)
from xverse.kernels.dispatch_sampling import (
    best_rows,
    count_rows,
    mask_rows,
    penalize_rows,
    sample_rows,
)
from xverse.kernels.multiply import ROWS
from xverse.kernels.reference_few_bits import Form
from xverse.kernels.tiles import MOST_ROWS


def multiply_rows(device: torch.device, dtype: torch.dtype, rows: int = 1) -> Choice:
    """The function in the place of `reference.multiply_rows`, for steps of `rows` tokens.

    It holds memory of its own: one for each stream that runs steps.
    """
    operation = "products of a decode step"
    why_not = why_no_triton(device, dtype)
    if why_not:
        return plain(operation, reference.multiply_rows, device, why_not)
    if rows > MOST_ROWS:
        why = f"{rows} tokens; the kernels that stream weights serve {MOST_ROWS} at most"
        return Choice(operation, "cuBLAS, by the reference", why, reference.multiply_rows)
    from xverse.kernels import multiply_rows_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        "Triton, fused with norm, SwiGLU and residual" + ", dependent launch" * pdl,
        f"{dtype} on CUDA, at most {MOST_ROWS} tokens; above, cuBLAS",
        partial(
            multiply_rows_triton.multiply_rows, scratch=multiply_rows_triton.Scratch(), pdl=pdl
        ),
    )


def embed_rows(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function in the place of `reference.embed_rows`."""
    return _one_pass("embedding of a decode step", "embed_rows", device, dtype)


def add_norm(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function in the place of `reference.add_norm`, for any number of tokens."""
    return _one_pass("residual and norm of many tokens", "add_norm", device, dtype)


def swiglu_joined(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function in the place of `reference.swiglu_joined`, for any number of tokens."""
    return _one_pass("SwiGLU of many tokens", "swiglu_joined", device, dtype)


def add_adapters(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function in the place of `reference_adapt.add_adapters`, for any number of tokens."""
    operation = "additions of adapters"
    why_not = why_no_triton(device, dtype)
    if why_not:
        return plain(operation, reference_adapt.add_adapters, device, why_not)
    from xverse.kernels import adapt_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        "Triton, by the slot of each row" + ", dependent launch" * pdl,
        f"{dtype} on CUDA",
        partial(adapt_triton.add_adapters, pdl=pdl),
    )


def rotate_store_attend(
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 1,
    heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 64,
    *,
    fp8: bool = False,
) -> Choice:
    """The function in the place of `reference.rotate_store_attend`, for a step of these sizes.

    It holds memory of its own: one for each stream that runs steps. `fp8`: that of the pages.
    """
    operation = "attention of a decode step" + " over FP8" * fp8
    why_not = why_no_triton(device, dtype, fp8=fp8)
    if why_not:
        return plain(operation, reference.rotate_store_attend, device, why_not)
    from xverse.kernels import attend_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    scratch = Scratch.reserve(rows, heads, kv_heads, head_dim, device, fp8=fp8)
    by = "in the tensor cores" if scratch.cut.dots else "by sums, one query head for each key head"
    return Choice(
        operation,
        f"Triton, paged, fused with rope and store, {by}" + ", dependent launch" * pdl,
        f"{dtype} on CUDA, {rows} tokens",
        partial(attend_triton.rotate_store_attend, scratch=scratch, pdl=pdl),
    )


def rotate_store(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Choice:
    """The function in the place of `reference.rotate_store`, for chunks of prompts."""
    operation = "rope and store of prompts" + " as FP8" * fp8
    why_not = why_no_triton(device, dtype, fp8=fp8)
    if why_not:
        return plain(operation, reference.rotate_store, device, why_not)
    from xverse.kernels import chunks_triton

    why = f"{dtype} on CUDA"
    return Choice(operation, "Triton, in one pass", why, chunks_triton.rotate_store)


def attend_chunks(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Choice:
    """The function in the place of `reference.attend_chunks`."""
    operation = "attention of prompts" + " over FP8" * fp8
    why_not = why_no_triton(device, dtype, fp8=fp8)
    if why_not:
        return plain(operation, reference.attend_chunks, device, why_not)
    from xverse.kernels import chunks_triton

    why = f"{dtype} on CUDA"
    return Choice(operation, "Triton, flash, over pages", why, chunks_triton.attend_chunks)


def attend_whole(device: torch.device, dtype: torch.dtype, *, grouped: bool = False) -> Choice:
    """The function in the place of `reference.attend`, for long prompts that begin here.

    `grouped`: whether several query heads share a key head.
    """
    operation = "attention of long prompts"
    why_not = why_no_triton(device, dtype) or "several query heads share a key head" * grouped
    if why_not:
        return Choice(operation, "none of its own", why_not, reference.attend)
    return Choice(operation, "cuDNN", f"{dtype} on CUDA", attend.attend_whole)


def attend_documents(device: torch.device, dtype: torch.dtype, *, equal: bool = False) -> Choice:
    """What mixes documents in a row: `attend.attend_documents`, or on a GPU `attend_rows` where
    they have `equal` lengths and `attend_offsets` otherwise, which take these in other forms."""
    operation = "attention of documents in a row" + ", of one length" * equal
    why_not = why_no_triton(device, dtype)
    if why_not:
        by = "PyTorch's, document by document"
        return Choice(operation, by, why_not, attend.attend_documents)
    if equal:
        return Choice(operation, "cuDNN", f"{dtype} on CUDA", attend.attend_rows)
    why = f"{dtype} on CUDA; cuDNN takes no offsets"
    return Choice(operation, "flash attention over offsets", why, attend.attend_offsets)


def score(device: torch.device) -> Choice:
    """The function in the place of `reference_train.score_logits`; it may overwrite the logits."""
    operation = "loss of a chunk of logits"
    why_not = why_no_triton(device, torch.bfloat16)
    if why_not:
        return plain(operation, reference_train.score_logits, device, why_not)
    from xverse.kernels import score_triton

    why = "each logit is read once and its gradient written once, in its place"
    return Choice(operation, "Triton, a program a row", why, score_triton.score_logits)


def adamw(device: torch.device) -> Choice:
    """The function in the place of `reference_train.adamw`."""
    operation = "update of weights"
    why_not = why_no_triton(device, torch.bfloat16)
    if device.type == "cpu":
        if native.why_not():
            why = f"{why_not}, and {native.why_not()}"
            return Choice(operation, "PyTorch, in pieces", why, update_cpu.adamw_in_pieces)
        return Choice(operation, "C, in one pass", why_not, update_cpu.adamw)
    if why_not:
        return plain(operation, reference_train.adamw, device, why_not)
    from xverse.kernels import update_triton

    why = "weight, moments and gradient are read once and written once"
    return Choice(operation, "Triton, in one pass", why, update_triton.adamw)


def mixture_rows(
    device: torch.device, dtype: torch.dtype, rows: int = 1, experts: int = 1
) -> Choice:
    """The function in the place of `reference_experts.mixture_rows`, for a step of these sizes.

    It holds memory of its own: one for each stream that runs steps.
    """
    operation = "experts of a decode step"
    why_not = why_no_triton(device, dtype)
    if why_not:
        return plain(operation, reference_experts.mixture_rows, device, why_not)
    from xverse.kernels import experts_triton, grouped_triton, route_triton

    scratch = route_triton.Scratch.reserve(rows, experts, device)
    if rows > ROWS:
        why = f"{rows} tokens; up to {ROWS} take each expert's weights without being sorted"
        call = partial(grouped_triton.mixture_rows, scratch=scratch)
        return Choice(operation, "Triton, sorted by expert", why, call)
    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        "Triton, router included, fused with norm, SwiGLU and residual"
        + ", dependent launch" * pdl,
        f"{dtype} on CUDA, at most {ROWS} tokens",
        partial(experts_triton.mixture_rows, scratch=scratch, pdl=pdl),
    )


def mix_experts(device: torch.device, dtype: torch.dtype, why_not: str = "") -> Choice:
    """The function with the signature of `reference_experts.mix_experts`, for any number of tokens.

    `why_not`: why these experts can only be called one by one, if so.
    """
    operation = "experts of a prompt"
    why_not = why_no_triton(device, dtype) or why_not
    if why_not:
        return plain(operation, reference_experts.mix_experts, device, why_not)
    from xverse.kernels import grouped_triton

    return Choice(
        operation,
        "Triton, sorted by expert, without a loop over experts",
        f"{dtype} on CUDA",
        grouped_triton.mix_experts,
    )


def add_parts(device: torch.device, dtype: torch.dtype) -> Choice:
    """What adds the parts of several ranks: a function with an `Exchange` as second argument, or
    `reference.add_parts`, for which PyTorch's collectives must have brought them together."""
    operation = "sums over ranks"
    why_not = why_no_triton(device, dtype) or _why_no_links()
    if why_not:
        by = "NCCL" if device.type == "cuda" else "the reference, parts gathered by gloo"
        return Choice(operation, by, why_not, reference.add_parts)
    from xverse.kernels import allreduce_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        f"Triton through shared memory up to {allreduce_triton.REDUCED_ROWS} rows, NCCL above",
        "one way over the link instead of NCCL's several",
        partial(allreduce_triton.add_parts, pdl=pdl),
    )


def gather_columns(device: torch.device, dtype: torch.dtype) -> Choice:
    """What puts the logits of several ranks side by side; as `add_parts`."""
    added = add_parts(device, dtype)
    operation = "gathers over ranks"
    if added.call is reference.add_parts:
        return Choice(operation, added.implementation, added.reason, reference.gather_columns)
    from xverse.kernels import allreduce_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        f"Triton through shared memory up to {allreduce_triton.GATHERED_ROWS} rows, NCCL above",
        added.reason,
        partial(allreduce_triton.gather_columns, pdl=pdl),
    )


def multiply_packed(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function with the meaning of `reference_packed.multiply_packed`, and its own weights."""
    return _compiled(
        "products with integer weights", packed.PackedWeights.multiply,
        reference_packed.multiply_packed, device, dtype,
    )  # fmt: skip


def store_attend(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function that keeps and attends as `reference.attend_pages`, for decoding on a CPU."""
    operation = "attention of a decode step on a CPU"
    return _compiled(operation, attend_cpu.store_attend, reference.attend_pages, device, dtype)


def table(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Every choice for this device and dtype, as `xverse doctor` prints them."""
    attention = (rotate_store_attend, rotate_store, attend_chunks)
    choosing = (best_rows, sample_rows, mask_rows, penalize_rows, count_rows)
    return [
        multiply_rows(device, dtype),
        embed_rows(device, dtype),
        multiply_few_bits(device, dtype),
        multiply_few_bits(device, dtype, fp8=True),
        embed_few_bits(device, dtype),
        add_norm(device, dtype),
        swiglu_joined(device, dtype),
        add_adapters(device, dtype),
        *(choose(device, dtype) for choose in attention),
        *(choose(device, dtype, fp8=True) for choose in attention),
        attend_whole(device, dtype),
        attend_documents(device, dtype),
        attend_documents(device, dtype, equal=True),
        score(device),
        adamw(device),
        *(choice(device) for choice in choosing),
        mixture_rows(device, dtype),
        mix_experts(device, dtype),
        *(
            multiply_steps(device, dtype, rows, Form(kind, 0, 16, 16))
            for kind in ("int4", "int8", "fp8")
            for rows in (1, ROWS_APART)
        ),
        *(widen(device, dtype, kind) for kind in ("int4", "int8", "fp8")),
        add_norm_rounded(device, dtype),
        swiglu_rounded(device, dtype),
        add_parts(device, dtype),
        gather_columns(device, dtype),
        multiply_packed(device, dtype),
        store_attend(device, dtype),
    ]


def _compiled(
    operation: str,
    call: Callable[..., Any],
    plain: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Choice:
    """What is in C, for CPUs alone."""
    why_not = native.why_not() if device.type == "cpu" else f"this is {device.type}, not a CPU"
    if not why_not and dtype not in native.FLOATS:
        why_not = f"{dtype} is not among bfloat16 and float32"
    if why_not:
        return Choice(operation, "plain PyTorch, the reference", why_not, plain)
    why = f"{native.variant()}, compiled at installation; this is {device.type}"
    return Choice(operation, "C, each row alone", why, call)


def _one_pass(operation: str, name: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What stands between products, by a kernel that reads and writes memory once."""
    why_not = why_no_triton(device, dtype)
    if why_not:
        return plain(operation, getattr(reference, name), device, why_not)
    from xverse.kernels import between_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        "Triton, in one pass" + ", dependent launch" * pdl,
        f"{dtype} on CUDA",
        partial(getattr(between_triton, name), pdl=pdl),
    )


def _why_no_links() -> str:
    """Why the GPUs of this machine cannot write into each other's memory; empty where they can."""
    gpus = range(torch.cuda.device_count())
    if len(gpus) < 2:
        return "this machine has one GPU"
    pairs = ((one, other) for one in gpus for other in gpus if one != other)
    apart = next((p for p in pairs if not torch.cuda.can_device_access_peer(*p)), None)
    return "" if apart is None else f"GPU {apart[0]} cannot reach the memory of GPU {apart[1]}"
