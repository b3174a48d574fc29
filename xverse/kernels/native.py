"""THE COMPILED PART. The library of `*_cpu.c` for this CPU, or why there is none."""

import ctypes
from functools import cache

import torch

from xverse.errors import XverseError
from xverse.kernels.compile_native import VARIANTS, library

FLOATS = {torch.float32: 0, torch.bfloat16: 1}  # what it computes with, by its flag
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Product(ctypes.Structure):
    """`Product` of native_cpu.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scale", "zero", "bias", "norm")),
        ("eps", ctypes.c_float),
        *((n, _INT) for n in ("norm_kind", "outputs", "inputs", "group", "bits", "gated")),
    )


class Pages(ctypes.Structure):
    """`Pages` of native_cpu.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("keys", "values", "tables", "lengths")),
        *((name, _LONG) for name in ("width", "page", "size")),
        *((name, _INT) for name in ("heads", "kv_heads")),
    )


class Layer(ctypes.Structure):
    """`Layer` of native_cpu.h."""

    _fields_ = (
        *((name, Product) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _POINTER) for name in ("keys", "values")),
    )


class Update(ctypes.Structure):
    """`Update` of native_cpu.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "first", "second", "gradient", "copy")),
        *((name, ctypes.c_float) for name in ("scale", "share1", "keep2", "share2")),
        *((name, ctypes.c_float) for name in ("bias2", "epsilon", "keep", "step_size")),
        ("seeds", ctypes.c_uint32 * 3),
        *((name, _INT) for name in ("weight16", "gradient16", "moments16")),
    )


SIGNATURES = {
    "multiply": [*[_POINTER] * 4, _LONG, _INT, _INT],
    "multiply_rows": [*[_POINTER] * 4, _LONG, _LONG, _LONG, _INT],
    "rotate": [*[_POINTER] * 3, _LONG, _LONG, _INT, _LONG, _INT, _INT],
    "attend": [*[_POINTER] * 5, *[_LONG] * 4, _INT, _INT],
    "decode": [_POINTER, _INT, *[_POINTER] * 4, _LONG, _INT, _INT],
    "adamw": [_POINTER, _LONG, _INT],
}


def variant() -> str:
    """The instructions of this CPU that a library was compiled for; empty where there are none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_vnni_supported():
        return "avx512"
    return "avx2" if capability in ("AVX2", "AVX512") else ""


@cache
def bf16_in_hardware() -> bool:
    """Whether this CPU multiplies bf16 itself; else PyTorch widens, at a fifth of the speed."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def no_memory(why: str) -> XverseError:
    """The error where a product found none."""
    fix = "Free memory, or use shorter steps (step_tokens)."
    return XverseError("There is no memory for a matrix product.", why, fix)


@cache
def load(name: str) -> ctypes.CDLL | str:
    """The library of a variant, or why it does not serve."""
    if name not in VARIANTS:
        return f"this CPU ({torch.backends.cpu.get_cpu_capability()}) has no AVX2"
    path = library(name)
    if not path.exists():
        return "the installation compiled nothing: it takes Linux and a C compiler (gcc)"
    try:
        # PyTorch has loaded its OpenMP by now, and the library takes that one: one set of threads.
        found = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    if missing := [function for function in SIGNATURES if not hasattr(found, function)]:
        return f"{path.name} is of an older version, without {missing[0]}: install again"
    for function, arguments in SIGNATURES.items():
        getattr(found, function).argtypes = arguments
        getattr(found, function).restype = _INT
    return found


@cache
def why_not() -> str:
    """Why nothing is compiled for this machine; empty where there is."""
    found = load(variant())
    return found if isinstance(found, str) else ""


@cache
def loaded() -> ctypes.CDLL:
    """The library, where `why_not` has nothing to say."""
    found = load(variant())
    assert not isinstance(found, str), found
    return found
