"""WHICH ARITHMETIC, AND WHY. The table from operation, device and dtype to what computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from xverse.kernels import reference
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


def add_parts(device: torch.device, dtype: torch.dtype) -> Choice:
    """What adds the parts of several ranks: a function with an `Exchange` as second argument, or
    `reference.add_parts`, for which PyTorch's collectives must have brought them together."""
    operation = "sums over ranks"
    why_not = _why_no_triton(device, dtype) or _why_no_links()
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


def table(device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """Every choice for this device and dtype, as `xverse doctor` prints them."""
    choices = [multiply_rows(device, dtype), rotate_store_attend(device, dtype)]
    return [*choices, add_parts(device, dtype), gather_columns(device, dtype)]


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


def _why_no_links() -> str:
    """Why the GPUs of this machine cannot write into each other's memory; empty where they can."""
    gpus = range(torch.cuda.device_count())
    if len(gpus) < 2:
        return "this machine has one GPU"
    pairs = ((one, other) for one in gpus for other in gpus if one != other)
    apart = next((p for p in pairs if not torch.cuda.can_device_access_peer(*p)), None)
    return "" if apart is None else f"GPU {apart[0]} cannot reach the memory of GPU {apart[1]}"


@lru_cache(maxsize=1)
def _triton_is_here() -> bool:
    return find_spec("triton") is not None
