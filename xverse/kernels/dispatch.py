"""WHICH ARITHMETIC, AND WHY. The table from operation, device and dtype to what computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.kernels.cuts import Scratch
from xverse.kernels.multiply import ROWS
from xverse.log import warn_once

TRITON_SINCE = (8, 0)  # compute capability: bf16 in the tensor cores
FP8_SINCE = (8, 9)  # conversions to and from e4m3 in the hardware
PDL_SINCE = (9, 0)  # programmatic dependent launch


@dataclass(frozen=True)
class Choice:
    """What computes an operation here: its function, its name for people, and the reason."""

    operation: str
    implementation: str
    reason: str
    call: Callable[..., Tensor]

    def __str__(self) -> str:
        return f"{self.operation}: {self.implementation} ({self.reason})"


def multiply_rows(device: torch.device, dtype: torch.dtype, rows: int = 1) -> Choice:
    """The function with the signature of `reference.multiply_rows`, for steps of `rows` tokens."""
    operation = "products of a decode step"
    why_not = _why_no_triton(device, dtype)
    if why_not:
        return _plain(operation, reference.multiply_rows, device, why_not)
    if rows > ROWS:
        why = f"{rows} tokens; the kernels that stream weights serve {ROWS} at most"
        return Choice(operation, "cuBLAS, by the reference", why, reference.multiply_rows)
    from xverse.kernels import multiply_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        "Triton, fused with norm, SwiGLU and residual" + ", dependent launch" * pdl,
        f"{dtype} on CUDA, at most {ROWS} tokens",
        partial(multiply_triton.multiply_rows, pdl=pdl),
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
    why_not = _why_no_triton(device, dtype, fp8=fp8)
    if why_not:
        return _plain(operation, reference.rotate_store_attend, device, why_not)
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
    why_not = _why_no_triton(device, dtype, fp8=fp8)
    if why_not:
        return _plain(operation, reference.rotate_store, device, why_not)
    from xverse.kernels import chunks_triton

    why = f"{dtype} on CUDA"
    return Choice(operation, "Triton, in one pass", why, chunks_triton.rotate_store)


def attend_chunks(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Choice:
    """The function in the place of `reference.attend_chunks`."""
    operation = "attention of prompts" + " over FP8" * fp8
    why_not = _why_no_triton(device, dtype, fp8=fp8)
    if why_not:
        return _plain(operation, reference.attend_chunks, device, why_not)
    from xverse.kernels import chunks_triton

    why = f"{dtype} on CUDA"
    return Choice(operation, "Triton, flash, over pages", why, chunks_triton.attend_chunks)


def table(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Every choice for this device and dtype, as `xverse doctor` prints them."""
    attention = (rotate_store_attend, rotate_store, attend_chunks)
    return [
        multiply_rows(device, dtype),
        *(choose(device, dtype) for choose in attention),
        *(choose(device, dtype, fp8=True) for choose in attention),
    ]


def _plain(operation: str, call: Callable[..., Tensor], device: torch.device, why: str) -> Choice:
    if device.type == "cuda":
        warn_once(f"{operation}: plain PyTorch, since {why}.")
    return Choice(operation, "plain PyTorch, the reference", why, call)


def _why_no_triton(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> str:
    """Why the Triton kernels do not serve here; empty where they do."""
    if device.type != "cuda":
        return f"they are for NVIDIA GPUs, and this is {device.type}"
    if not _triton_is_here():
        return "Triton is not installed; PyTorch for CUDA on Linux brings it"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_SINCE:
        return f"compute capability {capability} is below {TRITON_SINCE}"
    if fp8 and capability < FP8_SINCE:
        return f"compute capability {capability} is below {FP8_SINCE}, the first with FP8"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not among bfloat16 and float16"
    return ""


@lru_cache(maxsize=1)
def _triton_is_here() -> bool:
    return find_spec("triton") is not None
