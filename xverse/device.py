"""MACHINE -> FACTS. Device, dtype, memory, seeds, and every environment variable we read."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from xverse.errors import XverseError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


def env(name: str, default: str = "") -> str:
    """Value of the environment variable `name`; an empty value counts as unset."""
    return os.environ.get(name) or default


def env_flag(name: str) -> bool:
    """Whether `name` is set to something that means yes: 1, true, yes, on."""
    return env(name).strip().lower() in {"1", "true", "yes", "on"}


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_environment() -> dict[str, str]:
    """Ours, for a process of this package: it finds the package where this one did."""
    home = str(Path(__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [home, env("PYTHONPATH")]))}


def pick_device(name: str | None = None) -> "torch.device":
    """The device `name` ("cpu", "cuda", "cuda:1"), or without a name the best one there is.

    Raises XverseError where the device named is not on this machine.
    """
    import torch

    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise XverseError(
            f"There is no device called {name!r}.",
            str(error).splitlines()[0],
            'Use "cpu", "cuda" or "cuda:N".',
        ) from error
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in {"cpu", "cuda"} or (device.index or 0) >= present:
        raise XverseError(
            f"The device {name!r} is not on this machine.",
            f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices.",
            "Run `xverse doctor` to see what there is, or leave the device out.",
        )
    return device


def pick_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """The torch dtype called `name`; "auto" is bfloat16 wherever the device computes in it."""
    import torch

    if name == "auto":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported():
            return torch.float16
        return torch.bfloat16
    if name not in DTYPES:
        raise XverseError(
            f"The dtype {name!r} is not one that models run in.",
            "Weights are computed in 16 or 32 bit floating point.",
            f"Use one of: auto, {', '.join(DTYPES)}.",
        )
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def machine_name(device: "torch.device") -> str:
    """The card, or the processor with what PyTorch uses of it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {torch.get_num_threads()} threads"


def total_memory(device: "torch.device") -> int:
    """Bytes of memory that `device` has in all: of the card, or of the machine for the CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: "torch.device") -> int:
    """Bytes of memory that `device` could still give this process, as far as the system tells."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [total_memory(device)]
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
        free = [int(fields["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")  # the limit of a container; files it has cached can go
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()).isdecimal():
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(int(most) - int(used["anon"]))
    return max(0, min(free))
