"""HOW FAST DOES A GPU DECODE QUANTIZED WEIGHTS? XVERSE-7B's shape, random weights, one GPU.

    check   kernels against fp64 for every scheme; logits of steps against the same model in fp32
    tune    candidate cuts of each product: GB/s of weights, the best three listed
    speed   whole steps as CUDA graphs with greedy sampling, 128 tokens held and 256 more: tokens/s
    serve   the engine with 64 requests of 128 in, 128 out at int4: new tokens/s

`python -m bench.quant_decode_gpu check,speed` runs some of it; some seconds each on an H200: 40,
90, 40, 40. `TRITON_INTERPRET=1 ... --small` goes the same way on a CPU. Figures are kept after
every part, in bench/results.
"""

import dataclasses
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check_decode import distance
from bench.record import record
from bench.tune_decode import PRODUCTS, Product, arguments
from bench.tune_decode import seconds as graph_seconds
from xverse.engine.engine import Engine
from xverse.engine.footprint import bytes_per_token, copy_bandwidth
from xverse.engine.options import EngineOptions
from xverse.engine.step import DecodeStep
from xverse.kernels import reference, reference_few_bits
from xverse.kernels.few_bits_rows_triton import embed_rows, multiply_rows, some_rows
from xverse.kernels.few_bits_triton import one_row
from xverse.kernels.multiply_rows_triton import Scratch
from xverse.kernels.reference import Norm
from xverse.kernels.reference_few_bits import FewBits
from xverse.kernels.tiles import (
    FewBitsRowsTile,
    WordsTile,
    choose_few_bits_rows_tile,
    choose_words_tile,
)
from xverse.model.cache import Growing
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import kind_of
from xverse.quant.recipe import NAMED, Recipe
from xverse.quant.scheme import Scheme

SMALL = "--small" in sys.argv
DEVICE = torch.device("cpu" if SMALL else "cuda")
PARTS = ("check", "tune", "speed", "serve")
BYTES = 2**14 if SMALL else 2**30  # of weights that a graph reads: far more than the cache holds
PAGE, PROMPT, ANSWER = 64, 128, 8 if SMALL else 256
SIZES = (
    {name: p._replace(outputs=24, inputs=256) for name, p in PRODUCTS.items()}
    if SMALL
    else PRODUCTS
)
FP8 = Scheme(8, kind="float")
SCHEMES = {
    "int4 g128": Scheme(4, 128),
    "int4 g64": Scheme(4, 64),
    "int4 g32": Scheme(4, 32),
    "int4 row": Scheme(4),
    "int4 g128 asymmetric": Scheme(4, 128, symmetric=False),
    "int8 g128": Scheme(8, 128),
    "int8 g32 asymmetric": Scheme(8, 32, symmetric=False),
    "int8 row": Scheme(8),
    "fp8": FP8,
}
MODELS = {
    "int4": NAMED["int4"],
    "int8": dataclasses.replace(NAMED["int8"], head=Scheme(8)),
    "int8-row": Recipe(Scheme(8), head=Scheme(8)),
    "fp8": Recipe(FP8, head=FP8),
    "int4, int8 embedding": dataclasses.replace(NAMED["int4"], embedding=Scheme(8)),
}
TARGETS = {"int4": 650, "int8": 450}  # tokens/s, batch 1
LIMIT = 3e-2 if SMALL else 5e-3  # the interpreter cuts bf16 off instead of rounding


def random_weight(outputs: int, inputs: int, scheme: Scheme, *, std: float = 0.02) -> FewBits:
    """Steps of which all are equally likely, and scales that differ; weights of about `std`."""
    if scheme.kind == "float":
        wide = 100 * torch.randn(outputs, inputs, device=DEVICE)
        weight = wide.clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond, it has no numbers
        spread = 100.0
    elif scheme.bits == 8:
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=DEVICE)
        spread = 73.3
    else:
        size = (outputs, inputs // 2)
        weight = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE)
        spread = 4.6
    groups = (outputs,) if scheme.group_size is None else (outputs, inputs // scheme.group_size)
    scale = (0.75 + torch.rand(groups, device=DEVICE) / 2) * (std / spread)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(-3, 4, groups, dtype=torch.int8, device=DEVICE)
    return FewBits(weight, scale.bfloat16(), zero)


def random_model(shape: ModelShape, recipe: Recipe, *, std: float = 0.02) -> Decoder:
    """A fused decoder of random quantized layers, made where it runs."""
    with torch.device("meta"):
        decoder = Decoder(shape).to(torch.bfloat16)
    decoder = decoder.to_empty(device=DEVICE)
    for name, module in list(decoder.named_modules()):
        scheme = recipe.scheme_of(name, module)
        if scheme is not None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            made = random_weight(weight.shape[0], weight.shape[1], scheme, std=std)
            decoder.set_submodule(
                name, kind_of(name)(made.weight, made.scale, None, scheme, made.zero)
            )
    initialize(decoder, std=std)
    return fuse(decoder.eval().requires_grad_(False))


def dequantized(decoder: Decoder, shape: ModelShape, dtype: torch.dtype) -> Decoder:
    """The same model with plain weights of `dtype`."""
    with torch.device("meta"):
        plain = fuse(Decoder(shape)).to(dtype)
    plain = plain.to_empty(device=DEVICE).requires_grad_(False)
    for name, module in plain.named_modules():
        held = getattr(module, "weight", None)
        if not isinstance(held, Tensor):
            continue
        source = decoder.get_submodule(name)
        if isinstance(source, QuantizedLinear):
            matrix = FewBits(source.weight, source.scale, source.zero)
            held.copy_(reference_few_bits.dequantize(matrix))
        else:
            weight = source.weight
            assert isinstance(weight, Tensor), "as the one that it goes into"
            held.copy_(weight)
    return plain


# --- check


def exact(x: Tensor, weight: FewBits, extra: dict[str, object], *, gated: bool) -> Tensor:
    """In fp64, of x normalized as the kernels round it."""
    norm, residual = extra["norm"], extra["residual_TN"]
    if isinstance(norm, Norm):
        x = reference.rms_norm(x, norm.weight_D, norm.eps, weight_in_fp32=norm.weight_in_fp32)
    y = x.double() @ reference_few_bits.dequantize(weight).double().T
    if gated:
        y = reference.swiglu_joined(y)
    return y if not isinstance(residual, Tensor) else y + residual.double()


def check() -> dict[str, object]:
    """Distances to fp64; equal bits when a product is repeated and without dependent launch."""
    names = {"qkv", "gate_up", "down"}
    compile_all(
        [
            Job(name, kind, rows, chosen(name, SCHEMES[kind], rows))
            for kind in SCHEMES
            for name in SIZES
            for rows in (1, 2, 64)
            if name in names or kind in ("int4 g128", "int8 g128", "int8 row", "fp8")
        ]
    )
    figures: dict[str, object] = {}
    scratch = Scratch()
    for kind, scheme in SCHEMES.items():
        worst = 0.0
        for name, product in SIZES.items():
            if name not in names and kind != "int8 row":
                continue
            weight = random_weight(product.outputs, product.inputs, scheme)
            for tokens in (1, 2, 13, 40, 64):
                x = torch.randn(tokens, product.inputs, device=DEVICE).bfloat16()
                extra = surroundings(product, tokens)
                truth = exact(x, weight, extra, gated=product.gated)
                first = None
                for pdl in (False,) if SMALL else (True, True, kind != "int4 g128"):
                    fast = multiply_rows(x, weight, scratch=scratch, pdl=pdl, **extra)  # type: ignore[arg-type]
                    apart = distance(fast, truth)
                    worst = max(worst, apart)
                    assert apart < LIMIT, (kind, name, tokens, pdl, apart)
                    assert first is None or torch.equal(first, fast), (kind, name, tokens)
                    first = fast
        ids = torch.tensor([0, 23, 5], device=DEVICE)
        table = random_weight(24, 256, scheme)
        found, twin = embed_rows(ids, table), reference_few_bits.embed_rows(ids, table)
        assert distance(found, twin) < (1e-2 if SMALL else 1e-9), (kind, "embedding")
        figures[kind] = worst
        print(f"{kind:24} within {worst:.1e} of fp64", flush=True)
    return figures | {"logits": check_logits()}


def check_logits() -> dict[str, object]:
    """Logits of a step beside the same model in fp32, and those of the dequantized bf16 model."""
    shape = dataclasses.replace(CATALOG["xverse-7b"], num_hidden_layers=2)
    if SMALL:
        shape = small_shape()
    figures: dict[str, object] = {}
    for name, recipe in MODELS.items():
        decoder = random_model(shape, recipe)
        plain, wide = (dequantized(decoder, shape, d) for d in (torch.bfloat16, torch.float32))
        for rows in (1, 8, 64, 80):
            step, doors = step_of(decoder, rows), []
            for dtype in (torch.bfloat16, torch.float32):
                doors.append(Growing(shape, rows, dtype=dtype, device=DEVICE))
            for place in range(3):
                ids = (torch.arange(rows, device=DEVICE) * 13 + place * 5) % shape.vocab_size
                found = [
                    model(ids, door.extend([1] * rows), door)
                    for model, door in zip((plain, wide), doors, strict=True)
                ]
                step.ids.copy_(ids)
                step.positions.fill_(place)
                fused = step()
            ours, theirs = distance(fused, found[1]), distance(found[0], found[1])
            figures[f"{name}, {rows} rows"] = [round(ours, 5), round(theirs, 5)]
            print(f"{name:24}{rows:4} rows: {ours:.4f} (bf16 {theirs:.4f}) of fp32", flush=True)
            assert ours < 1.5 * theirs + 2e-3, (name, rows)
    return figures


def small_shape() -> ModelShape:
    return dataclasses.replace(
        CATALOG["xverse-7b"], vocab_size=128, hidden_size=256, intermediate_size=512,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=512,
    )  # fmt: skip


def step_of(decoder: Decoder, rows: int) -> DecodeStep:
    """A step over pages of its own, of random keys and values."""
    shape, pages = decoder.shape, -(-(PROMPT + ANSWER) // PAGE)
    pool = (rows * pages, shape.num_key_value_heads, PAGE, shape.head_dim)
    sides = [
        [torch.randn(pool, device=DEVICE).bfloat16() for _ in decoder.model.layers]
        for _ in range(2)
    ]
    table = torch.randperm(rows * pages, device=DEVICE).view(rows, pages).int()
    return DecodeStep(decoder, sides[0], sides[1], table)


# --- tune


class Job(NamedTuple):
    """A candidate: which product, with which scheme, how many rows, and its cut."""

    name: str
    kind: str
    rows: int
    tile: WordsTile | FewBitsRowsTile


ONE_ROW = {
    "qkv": [(4, 512, 6), (4, 512, 3), (8, 512, 3), (8, 512, 1), (4, 512, 1), (2, 512, 4)],
    "o": [(8, 512, 1), (4, 512, 1), (4, 512, 2), (2, 512, 2), (2, 512, 1)],
    "gate_up": [(4, 512, 3), (2, 512, 7), (2, 512, 4), (1, 512, 8), (4, 512, 1), (2, 512, 1)],
    "down": [(4, 512, 2), (8, 512, 1), (4, 512, 1), (4, 256, 2), (2, 512, 4), (2, 512, 2)],
    "head": [(4, 512, 8), (8, 512, 4), (4, 512, 4), (2, 512, 8), (4, 512, 16)],
}
SOME_ROWS = [(64, 4, 4), (64, 6, 4), (128, 3, 4), (128, 4, 8)]


def chosen(name: str, scheme: Scheme, rows: int) -> WordsTile | FewBitsRowsTile:
    """The cut that is taken today."""
    product = SIZES[name]
    outputs = product.outputs // 2 if product.gated else product.outputs
    if rows == 1:
        words = product.inputs * scheme.bits // 32
        return choose_words_tile(outputs, words, gated=product.gated)
    group = scheme.group_size or (0 if scheme.symmetric else product.inputs)
    return choose_few_bits_rows_tile(rows, outputs, product.inputs, group, gated=product.gated)


def candidates(name: str, scheme: Scheme, rows: int) -> list[WordsTile | FewBitsRowsTile]:
    """What is chosen today first; then the others."""
    product = SIZES[name]
    found: list[WordsTile | FewBitsRowsTile] = [chosen(name, scheme, rows)]
    if SMALL:
        return found
    if rows == 1:
        for outputs, words, tiles in ONE_ROW[name]:
            block = words * scheme.bits // 4
            found.append(WordsTile(outputs, block, tiles, block // 128))
            if scheme.bits == 4:
                found.append(WordsTile(outputs, block // 2, tiles, block // 256))
        return list(dict.fromkeys(found))
    for outputs, stages, warps in SOME_ROWS:
        if product.gated and outputs == 128 and rows == 64:
            continue
        for splits in (2, 4) if product.outputs <= 4096 else (1,):
            found.append(FewBitsRowsTile(outputs, 128, stages, warps, splits))
    return list(dict.fromkeys(found))


def jobs() -> Iterator[Job]:
    for kind in ("int4 g128", "int8 row"):
        for name in SIZES:
            if name == "head" and SCHEMES[kind].bits == 4:
                continue
            for rows in (1, 8) if SMALL or kind == "int8 row" else (1, 8, 64):
                for tile in candidates(name, SCHEMES[kind], rows):
                    yield Job(name, kind, rows, tile)


def surroundings(product: Product, tokens: int) -> dict[str, object]:
    if not SMALL:
        return arguments(product, tokens)
    outputs = product.outputs // 2 if product.gated else product.outputs
    residual = torch.randn(tokens, outputs).bfloat16()
    return {
        "norm": Norm(torch.rand(product.inputs).bfloat16(), 1e-6, True) if product.norm else None,
        "gated": product.gated,
        "residual_TN": residual if product.residual else None,
    }


def call_of(job: Job, x: Tensor, extra: dict[str, object]) -> Callable[[FewBits], Tensor]:
    if isinstance(job.tile, WordsTile):
        return partial(one_row, x, tile=job.tile, pdl=not SMALL, **extra)  # type: ignore[arg-type]
    return partial(
        some_rows,
        x,
        tile=job.tile,
        pdl=not SMALL,
        scratch=Scratch(),
        **extra,  # type: ignore[arg-type]
    )


def compile_one(job: Job) -> None:
    """Fill Triton's cache on disk, by a small weight whose kernel is that of the large one."""
    product = SIZES[job.name]
    small = product._replace(outputs=512 + product.outputs % 16)
    try:
        x = torch.zeros(job.rows, small.inputs, dtype=torch.bfloat16, device=DEVICE)
        weight = random_weight(small.outputs, small.inputs, SCHEMES[job.kind])
        call_of(job, x, surroundings(small, job.rows))(weight)
    except Exception as error:  # a tile may ask for more than the chip has; measuring says so too
        print(job, repr(error)[:100], flush=True)


def compile_all(some: list[Job]) -> None:
    if SMALL:
        return
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, some, chunksize=2)
    print(f"{len(some)} kernels in {time.perf_counter() - start:.0f} s", flush=True)


def seconds(work: Callable[[], object], launches: int) -> float:
    if not SMALL:
        return graph_seconds(work, launches)
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / launches


def tune() -> dict[str, object]:
    """GB/s of the best cuts, scales included, and of the one chosen today (marked *)."""
    every = list(jobs())
    compile_all(every)
    figures: dict[str, object] = {}
    for name, kind, rows in dict.fromkeys((job.name, job.kind, job.rows) for job in every):
        product = SIZES[name]
        one = random_weight(product.outputs, product.inputs, SCHEMES[kind])
        size = one.weight.nbytes + one.scale.nbytes
        copies = max(2, BYTES // size)
        weights = [FewBits(one.weight.clone(), one.scale.clone()) for _ in range(copies)]
        x = torch.randn(rows, product.inputs, device=DEVICE).bfloat16()
        extra = surroundings(product, rows)
        truth = exact(x, one, extra, gated=product.gated)
        found: list[tuple[float, str]] = []
        for job in (j for j in every if (j.name, j.kind, j.rows) == (name, kind, rows)):
            try:
                call = call_of(job, x, extra)
                apart = distance(call(weights[0]), truth)
                assert apart < LIMIT, f"wrong by {apart:.1e}"
                took = seconds(partial(_each, call, weights), copies)
            except Exception as error:
                print(f"{name} {kind} {rows} {tuple(job.tile)}: {repr(error)[:110]}", flush=True)
                continue
            found.append((size / took / 1e9, f"{tuple(job.tile)}{'*' * (not found)}"))
        found.sort(reverse=True)
        figures[f"{name}, {kind}, {rows} rows"] = [[round(s), tile] for s, tile in found]
        best = "  ".join(f"{speed:5.0f} {tile}" for speed, tile in found[:3])
        today = next((f"{speed:5.0f}" for speed, tile in found if "*" in tile), "none")
        print(f"{name:8}{kind:10}{rows:3} rows, today {today}; best {best}", flush=True)
    return figures


def _each(call: Callable[[FewBits], Tensor], weights: list[FewBits]) -> None:
    for weight in weights:
        call(weight)


# --- speed


@torch.inference_mode()
def speed() -> dict[str, object]:
    """Tokens/s of whole steps beside the floor: weights read once at the speed of a copy."""
    shape = small_shape() if SMALL else CATALOG["xverse-7b"]
    bandwidth = copy_bandwidth(DEVICE)
    figures: dict[str, object] = {"copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 3)}
    for name, recipe in list(MODELS.items())[:4]:
        decoder = random_model(shape, recipe)
        size = bytes_per_token(decoder)
        floor = bandwidth / size
        for rows in (1, 8, 64):
            step = step_of(decoder, rows)
            took = seconds_per_step(step)
            figure = {
                "tokens_per_s": round(rows / took, 1),
                "ms": round(took * 1e3, 4),
                "of_the_floor": round(1 / took / floor, 3),
                "weights_GB": round(size / 1e9, 3),
            }
            figures[f"{name}, {rows} rows"] = figure
            wanted = f", target {TARGETS[name]}" if name in TARGETS and rows == 1 else ""
            print(f"{name:10}{rows:3} rows {figure}{wanted}", flush=True)
            del step
            if not SMALL:
                torch.cuda.empty_cache()
        del decoder
    return figures


def seconds_per_step(step: DecodeStep) -> float:
    """Median of five answers, from position 128 on."""

    def then(logits: Tensor) -> None:
        step.ids.copy_(logits.argmax(-1))
        step.positions.add_(1)

    replay = (lambda: then(step())) if SMALL else step.capture(then)
    times = []
    for _ in range(1 if SMALL else 5):
        step.positions.fill_(PROMPT)
        wait()
        start = time.perf_counter()
        for _ in range(1 if SMALL else ANSWER):
            replay()
        wait()
        times.append((time.perf_counter() - start) / (1 if SMALL else ANSWER))
    return sorted(times)[len(times) // 2]


def wait() -> None:
    if not SMALL:
        torch.cuda.synchronize()


# --- serve


def serve() -> dict[str, object]:
    """64 requests at once through the engine, answers judged first."""
    from bench.throughput_gpu import answers_of, rounds, summary
    from xverse.engine.measure import warm

    shape = small_shape() if SMALL else CATALOG["xverse-7b"]
    decoder = random_model(shape, MODELS["int4"])
    tokens, length = (4096, 8) if SMALL else (None, 128)
    engine = Engine(decoder, options=EngineOptions(kv_tokens=tokens, max_running=64))
    print(f"steps by {type(engine.runner).__name__}", flush=True)
    figures: dict[str, object] = {"runner": type(engine.runner).__name__}
    try:
        figures["correctness"] = summary(answers_of(engine, (1, 4) if SMALL else (1, 64), steps=32))
        print(figures, flush=True)
    except Exception:
        traceback.print_exc()
    if not SMALL:
        warm(engine)
    for count in (2,) if SMALL else (64, 8, 1):
        runs = rounds(engine, "b", count, (length, length), (length, length), 1 if SMALL else 3)
        speeds = sorted(run.output_tokens_per_s for run in runs)
        figures[f"{count} x (128, 128)"] = [round(value, 1) for value in speeds]
        wanted = ", target 8,500" if count == 64 else ""
        print(f"{count} x (128, 128): {speeds[len(speeds) // 2]:,.0f} tok/s{wanted}", flush=True)
    return figures


def mend_interpreter() -> None:
    """Triton's interpreter multiplies the bits of bf16 matrices as if they were numbers."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):  # type: ignore[no-untyped-def]
        for one in (a, b):
            if one.dtype == tl.bfloat16 and one.data.dtype == numpy.uint16:
                one.data = (one.data.astype(numpy.uint32) << 16).view(numpy.float32)
        return plain(self, a, b, d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    if SMALL:
        assert os.environ.get("TRITON_INTERPRET") == "1", "kernels are for GPUs, or interpreted"
        mend_interpreter()
    asked = [word for word in sys.argv[1:] if not word.startswith("--")]
    parts = asked[0].split(",") if asked else list(PARTS)
    assert set(parts) <= set(PARTS), f"there are {PARTS}"
    some = "" if set(parts) == set(PARTS) else "_" + "_".join(parts)
    figures: dict[str, object] = {"model": "xverse-7b shape, random quantized weights, bf16"}
    for part in parts:
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                figures[part] = {"check": check, "tune": tune, "speed": speed, "serve": serve}[
                    part
                ]()
        except Exception:
            traceback.print_exc()
            figures[part] = traceback.format_exc().splitlines()[-1]
        print(f"--- {part}: {time.perf_counter() - start:.0f} s", flush=True)
        if not SMALL:
            print(record(f"quant_decode_h200{some}", figures, ("triton",)), flush=True)


if __name__ == "__main__":
    main()
