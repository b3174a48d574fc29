"""WHAT COMPUTES, AND WHY. One entry of the table, and why Triton's kernels may not serve."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

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
    call: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.operation}: {self.implementation} ({self.reason})"


def plain(operation: str, call: Callable[..., Any], device: torch.device, why: str) -> Choice:
    if device.type == "cuda":
        warn_once(f"{operation}: plain PyTorch, since {why}.")
    return Choice(operation, "plain PyTorch, the reference", why, call)


def why_no_triton(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> str:
    """Why the Triton kernels do not serve here; empty where they do."""
    if device.type != "cuda":
        return f"they are for NVIDIA GPUs, and this is {device.type}"
    if not triton_is_here():
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
def triton_is_here() -> bool:
    return find_spec("triton") is not None
