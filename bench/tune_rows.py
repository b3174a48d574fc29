"""WHICH CUT OF 2 TO 64 TOKENS? And from where on is cuBLAS better? XVERSE-7B shapes, bf16.

First correctness: against fp64, and chained by dependent launch against not. Then every candidate
as CUDA graphs over more weights than the cache holds, cuBLAS beside them, what stands between
products, and whole steps. Prints tables; winners go into `kernels/tiles.py` by hand. `--parts
check,tiles,cublas,between,steps` runs some of it; and the figures are recorded.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.record import record
from bench.tune_decode import PRODUCTS, Product
from xverse.kernels import between_triton, reference
from xverse.kernels.multiply_rows_triton import Scratch, multiply_rows, some_rows
from xverse.kernels.reference import Norm
from xverse.kernels.tiles import RowsTile, block_of_rows, choose_rows_tile

BYTES = 2**30  # of weights a graph reads: 20 times the second-level cache
SHARED = 227 * 1024  # bytes of a multiprocessor that a program may have
ROWS = (8, 16, 32)
CUBLAS_ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
STEP_ROWS = (8, 16, 32, 64, 128, 256, 512, 1024)
CONTEXT, PAGE = 200, 16

# x in the pipeline, norm ahead
CUTS = [(64, 128, 4, 4), (64, 128, 3, 4), (64, 128, 5, 4), (64, 128, 6, 4), (64, 64, 8, 4)]
CUTS += [(64, 256, 3, 4), (128, 64, 4, 4), (64, 64, 6, 4)]
SPLITS = {
    "qkv": (1, 2, 3),
    "o": (1, 2, 3, 4),
    "gate_up": (1, 2, 3),
    "down": (1, 2, 3, 4),
    "head": (1,),
}


def candidates(name: str, rows: int) -> Iterator[RowsTile]:
    """The cut chosen today, and others that fit the chip."""
    product = PRODUCTS[name]
    sides = 2 if product.gated else 1
    chosen = choose_rows_tile(rows, product.outputs // sides, product.inputs, gated=product.gated)
    yield chosen
    cuts = dict.fromkeys((n, d, max(2, s // sides), w) for n, d, s, w in CUTS)
    for outputs, inputs, stages, warps in cuts:
        for splits in SPLITS[name]:
            tile = RowsTile(outputs, inputs, stages, warps, splits)
            loads = outputs * sides + block_of_rows(rows)
            shared = (stages * loads + block_of_rows(rows)) * inputs * 2
            if tile != chosen and shared <= SHARED:
                yield tile


def surroundings(product: Product, rows: int) -> dict[str, object]:
    """What a step hands to `some_rows` beside x and the weight."""
    outputs = product.outputs // 2 if product.gated else product.outputs
    norm_D = 1 + torch.randn(product.inputs, device="cuda").bfloat16() / 8
    residual = torch.randn(rows, outputs, device="cuda").bfloat16()
    return {
        "norm": Norm(norm_D, 1e-6, True) if product.norm else None,
        "residual_TN": residual if product.residual else None,
        "gated": product.gated,
    }


def compile_one(job: tuple[str, int, RowsTile]) -> None:
    """Fill Triton's cache on disk, by a small weight whose kernel is that of the large one."""
    name, rows, tile = job
    product = PRODUCTS[name]
    small = product._replace(outputs=512 + product.outputs % 16)
    weight = torch.zeros(small.outputs, small.inputs, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(rows, small.inputs, dtype=torch.bfloat16, device="cuda")
    try:
        extra = surroundings(small, rows)
        some_rows(x, weight, tile=tile, pdl=True, **extra)  # type: ignore[arg-type]
    except Exception as error:  # a tile may ask for more than the chip has; measuring says so too
        print(name, rows, tuple(tile), repr(error)[:100], flush=True)


def compile_all() -> None:
    jobs: list[tuple[str, int, RowsTile]] = []
    for name in PRODUCTS:
        for rows in (16, 32):  # 8 rows take the kernel of 16
            jobs += [(name, rows, tile) for tile in candidates(name, rows)]
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs, chunksize=4)
    print(f"{len(jobs)} kernels compiled in {time.perf_counter() - start:.0f} s", flush=True)


def seconds(work: Callable[[], object], launches: int) -> float:
    """Median time of one of `launches` launches, of which `work` is made, as a CUDA graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(10):
        graph.replay()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2] / launches


def distance(fast: Tensor, twin: Tensor) -> float:
    """|fast - twin| / |twin|; NaN anywhere gives NaN, which no limit passes."""
    return float((fast.double() - twin.double()).norm() / twin.double().norm())


def exact_product(name: str, x: Tensor, weight: Tensor, extra: dict[str, object]) -> Tensor:
    """In fp64, of the normalized x as the step rounds it."""
    norm, residual = extra["norm"], extra["residual_TN"]
    if isinstance(norm, Norm):
        x = reference.rms_norm(x, norm.weight_D, norm.eps, weight_in_fp32=norm.weight_in_fp32)
    wide = residual.double() if isinstance(residual, Tensor) else None
    return reference.multiply_rows(
        x.double(), weight.double(), residual_TN=wide, gated=PRODUCTS[name].gated
    )


def check() -> None:
    for name, product in PRODUCTS.items():
        weight = torch.randn(product.outputs, product.inputs, device="cuda").bfloat16() / 64
        worst = 0.0
        for rows in (2, 8, 16, 17, 32):
            x = torch.randn(rows, product.inputs, device="cuda").bfloat16()
            extra = surroundings(product, rows)
            exact = exact_product(name, x, weight, extra)
            for pdl in (False, True):
                fast = some_rows(x, weight, pdl=pdl, **extra)  # type: ignore[arg-type]
                worst = max(worst, distance(fast, exact))
                assert distance(fast, exact) < 5e-3, (name, rows, pdl, distance(fast, exact))
        print(f"{name}: within {worst:.1e} of fp64", flush=True)
    for rows in (2, 16, 32):
        check_chain(rows)
    for rows in (65, 1024, 16384):
        check_between(rows)


def check_chain(rows: int) -> None:
    """Four products that read each other's output: by dependent launch the bits are the same."""
    size = {"o": (4096, 4096), "up": (22016, 4096), "down": (4096, 11008), "qkv": (12288, 4096)}
    weights = {name: torch.randn(s, device="cuda").bfloat16() / 64 for name, s in size.items()}
    norm = Norm(torch.rand(4096, device="cuda").bfloat16(), 1e-6, True)
    x, stream = (torch.empty(rows, 4096, device="cuda").bfloat16() for _ in range(2))
    scratch = Scratch()

    def chain(pdl: bool) -> Tensor:
        multiply = partial(multiply_rows, scratch=scratch, pdl=pdl)
        first = multiply(x, weights["o"], residual_TN=stream)
        inner = multiply(first, weights["up"], norm=norm, gated=True)
        second = multiply(inner, weights["down"], residual_TN=first)
        return multiply(second, weights["qkv"], norm=norm)

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(True)
    for _ in range(50):
        x.normal_()
        stream.normal_()
        graph.replay()
        assert torch.equal(y, chain(False)), ("dependent launch changes bits", rows)
    print(f"chain of {rows} rows: equal bits with and without dependent launch", flush=True)


def check_between(rows: int) -> None:
    x, residual = (torch.randn(rows, 4096, device="cuda").bfloat16() for _ in range(2))
    norm = Norm(torch.rand(4096, device="cuda").bfloat16(), 1e-6, True)
    pairs = zip(
        between_triton.add_norm(x, residual, norm),
        reference.add_norm(x, residual, norm),
        strict=True,
    )
    assert all(distance(fast, twin) < 2e-3 for fast, twin in pairs), rows
    joined = torch.randn(rows, 22016, device="cuda").bfloat16()
    apart = distance(between_triton.swiglu_joined(joined), reference.swiglu_joined(joined))
    assert apart < 2e-3, (rows, apart)


def weights_of(name: str) -> list[Tensor]:
    product = PRODUCTS[name]
    copies = max(3, BYTES // (2 * product.outputs * product.inputs))
    shape = (copies, product.outputs, product.inputs)
    return list(torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 1 / 64))


def speed_of(name: str, rows: int, tile: RowsTile, weights: list[Tensor]) -> float:
    """Microseconds of one product, after a look at its result."""
    x = torch.randn(rows, PRODUCTS[name].inputs, device="cuda").bfloat16()
    extra, scratch = surroundings(PRODUCTS[name], rows), Scratch()
    fast = some_rows(x, weights[0], tile=tile, pdl=True, scratch=scratch, **extra)  # type: ignore[arg-type]
    apart = distance(fast, reference.multiply_rows(x, weights[0], **extra))  # type: ignore[arg-type]
    assert apart < 1e-2, f"wrong by {apart:.2e}"

    def work() -> None:
        for weight in weights:
            some_rows(x, weight, tile=tile, pdl=True, scratch=scratch, **extra)  # type: ignore[arg-type]

    return seconds(work, len(weights)) * 1e6


def tune() -> dict[str, object]:
    """The three best cuts of each matrix at each number of rows, and the one chosen today."""
    figures: dict[str, object] = {}
    for name in PRODUCTS:
        weights = weights_of(name)
        size = weights[0].nbytes
        for rows in ROWS:
            found: list[tuple[float, RowsTile]] = []
            for tile in candidates(name, rows):
                try:
                    found.append((speed_of(name, rows, tile, weights), tile))
                except Exception as error:
                    print(f"{name} {rows} {tuple(tile)}: {repr(error)[:90]}", flush=True)
            chosen = [f"{us:.1f}" for us, tile in found[:1]]
            found.sort()
            figures[f"{name} {rows}"] = [(round(us, 2), tuple(tile)) for us, tile in found]
            print(f"{name:8} {rows:3} rows, chosen today {chosen} us; best:", flush=True)
            for us, tile in found[:3]:
                print(f"    {us:7.1f} us {size / us / 1e3:6.0f} GB/s  {tuple(tile)}", flush=True)
    return figures


def cublas() -> dict[str, object]:
    """Microseconds of `functional.linear`, without norm, SwiGLU or residual."""
    figures: dict[str, object] = {}
    print("cuBLAS us   " + "".join(f"{rows:8}" for rows in CUBLAS_ROWS))
    for name in PRODUCTS:
        weights, line = weights_of(name), []
        for rows in CUBLAS_ROWS:
            x = torch.randn(rows, PRODUCTS[name].inputs, device="cuda").bfloat16()

            def work(x: Tensor = x, weights: list[Tensor] = weights) -> None:
                for weight in weights:
                    functional.linear(x, weight)

            line.append(round(seconds(work, len(weights)) * 1e6, 1))
        figures[name] = dict(zip(CUBLAS_ROWS, line, strict=True))
        print(f"{name:12}" + "".join(f"{us:8.1f}" for us in line), flush=True)
    return figures


def between() -> dict[str, object]:
    """Microseconds, and GB/s read and written, of what stands between products."""
    figures: dict[str, object] = {}
    norm = Norm(torch.rand(4096, device="cuda").bfloat16(), 1e-6, True)
    for rows in (65, 256, 1024, 4096, 16384):
        copies = max(2, 2**28 // (rows * 4096 * 4))
        xs = torch.randn(copies, 2, rows, 4096, device="cuda").bfloat16()
        joined = torch.randn(copies, rows, 22016, device="cuda").bfloat16()
        adding = partial(_all, [partial(between_triton.add_norm, x[0], x[1], norm) for x in xs])
        gating = partial(_all, [partial(between_triton.swiglu_joined, x) for x in joined])
        for name, work, size in (
            ("add_norm", adding, 4 * rows * 4096 * 2),
            ("swiglu_joined", gating, 3 * rows * 11008 * 2),
        ):
            us = seconds(work, copies) * 1e6
            figures[f"{name} {rows}"] = round(us, 2)
            print(f"{name:14} {rows:6} rows {us:8.1f} us {size / us / 1e3:6.0f} GB/s", flush=True)
    return figures


def _all(works: list[Callable[[], object]]) -> None:
    for work in works:
        work()


@torch.no_grad()
def steps() -> dict[str, object]:
    """Milliseconds of whole steps of XVERSE-7B; more than 256 rows share pages of KV."""
    from bench.decode_gpu import random_model
    from xverse.engine.step import DecodeStep
    from xverse.model.catalog import CATALOG

    shape = CATALOG["xverse-7b"]
    decoder, width = random_model(shape), CONTEXT // PAGE + 1
    pool = (256 * width, shape.num_key_value_heads, PAGE, shape.head_dim)
    sides = [
        [torch.zeros(pool, dtype=torch.bfloat16, device="cuda") for _ in decoder.model.layers]
        for _ in range(2)
    ]
    order = torch.randperm(pool[0], device="cuda").view(256, width).int()
    figures: dict[str, object] = {}
    for rows in STEP_ROWS:
        pages = order.repeat(-(-rows // 256), 1)[:rows].contiguous()
        step = DecodeStep(decoder, sides[0], sides[1], pages)
        step.ids.copy_(torch.arange(rows, device="cuda") * 31 % shape.vocab_size)
        step.positions.fill_(CONTEXT)
        try:
            ms = seconds(step, 1) * 1e3
        except Exception as error:
            print(f"step of {rows} rows: {repr(error)[:200]}", flush=True)
            continue
        figures[str(rows)] = round(ms, 4)
        speed = rows / ms * 1e3
        print(f"step of {rows:5} rows {ms:8.3f} ms {speed:8.0f} tokens/s", flush=True)
    return figures


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = "check,tiles,cublas,between,steps"
    if "--parts" in sys.argv:
        parts = sys.argv[sys.argv.index("--parts") + 1]
    figures: dict[str, object] = {}
    compile_all()
    if "check" in parts:
        check()
    for name, part in (("tiles", tune), ("cublas", cublas), ("between", between), ("steps", steps)):
        if name in parts:
            start = time.perf_counter()
            figures[name] = part()
            torch.cuda.empty_cache()
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(record("tune_rows", figures, ("triton",)))


if __name__ == "__main__":
    main()
