"""THE COMPILED PART. The library of `multiply_cpu.c` for this CPU, or why there is none."""

import ctypes
from functools import cache

import torch

from xverse.kernels.compile_native import VARIANTS, library

FLOATS = {torch.float32: 0, torch.bfloat16: 1}  # what it computes with, by its flag


class Product(ctypes.Structure):
    """`Product` of multiply_cpu.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero", "bias", "norm")),
        ("eps", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in ("norm_kind", "outputs", "inputs", "group", "bits", "gated")
        ),
    )


def variant() -> str:
    """The instructions of this CPU that a library was compiled for; empty where there are none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "avx512"
    return "avx2" if capability in ("AVX2", "AVX512") else ""


@cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of a variant, or why it does not serve."""
    if name not in VARIANTS:
        return f"this CPU ({torch.backends.cpu.get_cpu_capability()}) has no AVX2"
    path = library(name)
    if not path.exists():
        return "the installation compiled nothing; reinstall with a C compiler at hand (gcc, Linux)"
    try:
        # PyTorch has loaded its OpenMP by now, and the library takes that one: one set of threads.
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    pointer, number = ctypes.c_void_p, ctypes.c_int
    found.multiply.argtypes = [pointer] * 4 + [ctypes.c_int64, number, number]
    found.multiply.restype = number
    return found


def why_not() -> str:
    """Why products with integer weights are PyTorch's here; empty where they are compiled."""
    found = load(variant())
    return found if isinstance(found, str) else ""
