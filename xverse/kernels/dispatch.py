"""WHICH ARITHMETIC, AND WHY. The table from operation, device and dtype to what computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from xverse.kernels import reference, reference_experts
from xverse.kernels.multiply import ROWS
from xverse.log import warn_once

TRITON_SINCE = (8, 0)  # compute capability: bf16 in the tensor cores
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
) -> Choice:
    """The function in the place of `reference.rotate_store_attend`, for a step of these sizes.

    It holds memory of its own: one for each stream that runs steps.
    """
    why_not = _why_no_triton(device, dtype)
    if why_not:
        return _plain("attention of a decode step", reference.rotate_store_attend, device, why_not)
    from xverse.kernels import attend_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    scratch = attend_triton.Scratch.reserve(rows, heads, kv_heads, head_dim, device)
    return Choice(
        "attention of a decode step",
        "Triton, paged, in parts, fused with rope and store" + ", dependent launch" * pdl,
        f"{dtype} on CUDA",
        partial(attend_triton.rotate_store_attend, scratch=scratch, pdl=pdl),
    )


def mixture_rows(
    device: torch.device, dtype: torch.dtype, rows: int = 1, experts: int = 1
) -> Choice:
    """The function in the place of `reference_experts.mixture_rows`, for a step of these sizes.

    It holds memory of its own: one for each stream that runs steps.
    """
    operation = "experts of a decode step"
    why_not = _why_no_triton(device, dtype)
    if why_not:
        return _plain(operation, reference_experts.mixture_rows, device, why_not)
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
    why_not = _why_no_triton(device, dtype) or why_not
    if why_not:
        return _plain(operation, reference_experts.mix_experts, device, why_not)
    from xverse.kernels import grouped_triton

    return Choice(
        operation,
        "Triton, sorted by expert, without a loop over experts",
        f"{dtype} on CUDA",
        grouped_triton.mix_experts,
    )


def table(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Every choice for this device and dtype, as `xverse doctor` prints them."""
    return [
        multiply_rows(device, dtype),
        rotate_store_attend(device, dtype),
        mixture_rows(device, dtype),
        mix_experts(device, dtype),
    ]


def _plain(operation: str, call: Callable[..., Tensor], device: torch.device, why: str) -> Choice:
    if device.type == "cuda":
        warn_once(f"{operation}: plain PyTorch, since {why}.")
    return Choice(operation, "plain PyTorch, the reference", why, call)


def _why_no_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels do not serve here; empty where they do."""
    if device.type != "cuda":
        return f"they are for NVIDIA GPUs, and this is {device.type}"
    if not _triton_is_here():
        return "Triton is not installed; PyTorch for CUDA on Linux brings it"
    capability = torch.cuda.get_device_capability(device)
    if capability < TRITON_SINCE:
        return f"compute capability {capability} is below {TRITON_SINCE}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not among bfloat16 and float16"
    return ""


@lru_cache(maxsize=1)
def _triton_is_here() -> bool:
    return find_spec("triton") is not None
