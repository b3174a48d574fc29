"""WHICH ARITHMETIC FOR FEW BITS, AND WHY. As `dispatch`, for quantized weights on a GPU."""

from functools import lru_cache, partial

import torch

from xverse.kernels import multiply_rounded, reference_few_bits, reference_steps
from xverse.kernels.choice import PDL_SINCE, Choice, plain, why_no_triton
from xverse.kernels.multiply_rounded import LEAST_ROWS
from xverse.kernels.reference_few_bits import FewBits, Form
from xverse.kernels.tiles import FEW_BITS_ROWS

# Rows up to which quantized weights are widened in registers, for every block of 128 rows anew.
# Above, widening them once into memory costs less (all of 7B: 13 GB written and read, 6 ms):
# computed, for `bench/quant_gpu.py` to confirm.
TILE_ROWS = 256
# And rows up to which a weight is widened whole: a part at a time is 800 launches for a prompt of
# 7B, which the host needs 50 ms for, whatever the prompt. The GPU needs as long for 2,000 tokens.
WHOLE_ROWS = 2048
ROWS_APART = max(TILE_ROWS, LEAST_ROWS, WHOLE_ROWS) + 1


def multiply_few_bits(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Choice:
    """The function in the place of `reference_few_bits.multiply_rows`, for up to FEW_BITS_ROWS
    tokens; it holds memory of its own, one for each stream that runs steps. `fp8`: that of weights.
    """
    operation = "products of a decode step with weights in " + ("FP8" if fp8 else "integers")
    why_not = _why_no_few_bits(device, dtype, fp8=fp8)
    if why_not:
        return plain(operation, reference_few_bits.multiply_rows, device, why_not)
    from xverse.kernels import few_bits_rows_triton
    from xverse.kernels.multiply_rows_triton import Scratch as Sums

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    return Choice(
        operation,
        "Triton, as they are stored, fused with norm, SwiGLU and residual"
        + ", dependent launch" * pdl,
        f"{dtype} on CUDA, at most {FEW_BITS_ROWS} tokens; above, weights are dequantized",
        partial(few_bits_rows_triton.multiply_rows, scratch=Sums(), pdl=pdl),
    )


def embed_few_bits(device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> Choice:
    """The function in the place of `reference_few_bits.embed_rows`; `fp8`: that of the vectors."""
    operation = "embedding of a decode step with vectors in " + ("FP8" if fp8 else "integers")
    why_not = _why_no_few_bits(device, dtype, fp8=fp8)
    if why_not:
        return plain(operation, reference_few_bits.embed_rows, device, why_not)
    from xverse.kernels import few_bits_rows_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    call = partial(few_bits_rows_triton.embed_rows, pdl=pdl)
    return Choice(operation, "Triton, in one pass", f"{dtype} on CUDA", call)


@lru_cache(maxsize=4096)
def multiply_steps(device: torch.device, dtype: torch.dtype, rows: int, form: Form) -> Choice:
    """The function in the place of `reference_steps.multiply_steps`, for a weight of this form.

    `rows` of x; from ROWS_APART on they need not be told apart. Nothing is kept between calls.
    """
    operation = f"products of many rows with {form.kind} weights"
    why_not = why_no_triton(device, dtype)
    if why_not:
        return plain(operation, reference_steps.multiply_steps, device, why_not)
    from xverse.kernels import dequantize_triton, multiply_steps_triton

    if rows >= LEAST_ROWS and not why_not_rounded(device, dtype, form):
        why = f"{LEAST_ROWS} rows or more, of which each has a scale"
        return Choice(operation, "cuBLAS in 8 bits, x rounded", why, _multiply_rounding)
    why_not_tiles = multiply_steps_triton.why_not(form)
    if rows <= TILE_ROWS and not why_not_tiles:
        why = f"at most {TILE_ROWS} rows: weights are read as they are held"
        call = multiply_steps_triton.multiply_steps
        return Choice(operation, "Triton, widened in registers", why, call)
    why = f"more than {TILE_ROWS} rows: widened once costs less than for every block of them"
    why = why if rows > TILE_ROWS else why_not_tiles
    widened = dequantize_triton.multiply_widened
    if rows > WHOLE_ROWS:
        return Choice(operation, "widened part by part, then cuBLAS", why, widened)
    whole = partial(widened, numbers=dequantize_triton.MOST_NUMBERS)
    return Choice(operation, "widened whole, then cuBLAS", why, whole)


@lru_cache(maxsize=64)
def widen(device: torch.device, dtype: torch.dtype, kind: str) -> Choice:
    """The function in the place of `reference_steps.widen`; `kind` as in `Form`."""
    operation = f"{kind} weights made {str(dtype).removeprefix('torch.')}"
    why_not = why_no_triton(device, dtype, fp8=kind == "fp8")
    if why_not:
        return plain(operation, reference_steps.widen, device, why_not)
    from xverse.kernels import dequantize_triton

    why = f"{dtype} on CUDA"
    return Choice(operation, "Triton, in one pass", why, dequantize_triton.dequantize)


def why_not_rounded(device: torch.device, dtype: torch.dtype, form: Form) -> str:
    """Why many rows are not rounded to 8 bits for a product with such a weight; empty where they
    are: by `round_triton` and `multiply_rounded`."""
    why_not = "" if dtype == torch.bfloat16 else f"cuBLAS gives bfloat16 there, and not {dtype}"
    return why_not or why_no_triton(device, dtype, fp8=True) or multiply_rounded.why_not(form)


def _multiply_rounding(x_TD: torch.Tensor, weight: FewBits) -> torch.Tensor:
    from xverse.kernels import round_triton

    return multiply_rounded.multiply_rounded(round_triton.round_rows(x_TD), weight)


def add_norm_rounded(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function in the place of `reference_steps.add_norm_rounded`."""
    return _one_pass_rounded("residual and norm in 8 bits", "add_norm_rounded", device, dtype)


def swiglu_rounded(device: torch.device, dtype: torch.dtype) -> Choice:
    """The function in the place of `reference_steps.swiglu_rounded`."""
    return _one_pass_rounded("SwiGLU in 8 bits", "swiglu_rounded", device, dtype)


def _one_pass_rounded(
    operation: str, name: str, device: torch.device, dtype: torch.dtype
) -> Choice:
    """What makes the input of products in 8 bits, and rounds it on the way."""
    why_not = why_no_triton(device, dtype, fp8=True)
    if why_not:  # not said: then nothing is multiplied in 8 bits, and nobody asks for it
        return Choice(
            operation, "plain PyTorch, the reference", why_not, getattr(reference_steps, name)
        )
    from xverse.kernels import round_triton

    pdl = torch.cuda.get_device_capability(device) >= PDL_SINCE
    call = partial(getattr(round_triton, name), pdl=pdl)
    why = f"{dtype} on CUDA"
    return Choice(operation, "Triton, in one pass" + ", dependent launch" * pdl, why, call)


def _why_no_few_bits(device: torch.device, dtype: torch.dtype, *, fp8: bool) -> str:
    """Why the Triton kernels of quantized weights do not serve here; empty where they do."""
    if dtype == torch.float16:
        return f"{dtype} is not bfloat16, whose bits are the upper half of a float's"
    return why_no_triton(device, dtype, fp8=fp8)
