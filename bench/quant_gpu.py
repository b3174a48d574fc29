"""QUANTIZED MODELS ON A GPU, OUTSIDE THE DECODE STEP: many rows, prompts, memory, calibration.

    python -m bench.quant_gpu [--sections check,rows,prefill,memory,calibrate] [--small] [--full]

    check      45 s   kernels against their twins in fp64, every scheme
    rows       35 s   which way is faster for how many rows; ways of multiplying in 8 bits
    prefill    40 s   8,191 tokens of XVERSE-7B's shape: bf16, fp8 (W8A8), int8, int4
    memory    100 s   peak of PyTorch's memory while decoding at a context of 2,048: 7B and 13B
    calibrate  30 s   GPTQ of 7B, 128 x 2,048 tokens: three blocks, from which the rest is computed;
                      with --full all of them

Seconds are guesses, compiling included. Weights are random, made on the device as they are stored.
`--small` goes the same way with a tiny shape on a CPU, kernels in Triton's interpreter if
TRITON_INTERPRET is 1 (which rounds fp8 wrongly: there norm and swiglu of `check` are FAILED).
What a section found is in bench/results before the next begins.
"""

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from bench.record import record
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.footprint import weight_bytes
from xverse.engine.host_table import keep_on_host
from xverse.engine.options import EngineOptions
from xverse.engine.paged import Paged
from xverse.engine.request import Request, Sampling, Token
from xverse.kernels import dispatch_quantized, multiply_rounded, reference_steps
from xverse.kernels.look_up import look_up
from xverse.kernels.reference import Norm
from xverse.kernels.reference_few_bits import FewBits, dequantize, pack_nibbles
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder
from xverse.model.fresh import random_decoder
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.quant.calibrate import quantize_block
from xverse.quant.linear import QuantizedLinear
from xverse.quant.passage import Passage
from xverse.quant.prepare import prepare
from xverse.quant.quantize import quantize_ends, rounded_layer
from xverse.quant.recipe import NAMED, Recipe
from xverse.quant.scheme import Scheme

SECTIONS = ("check", "rows", "prefill", "memory", "calibrate")
TINY = ModelShape(
    model_type="xverse",
    vocab_size=300,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
SMALL_GROUPS = 64  # which divide the tiny shape's layers
Figures = dict[str, object]
COPIES = range(4)  # of a weight that is timed, so that no cache holds it


class Place:
    """Where it runs, and how large."""

    def __init__(self, *, small: bool, full: bool) -> None:
        self.small, self.full = small, full
        self.device = torch.device("cpu" if small else "cuda")
        self.dtype = torch.bfloat16
        self.kernels = not small or os.environ.get("TRITON_INTERPRET") == "1"

    def shape(self, name: str) -> ModelShape:
        return TINY if self.small else CATALOG[name]

    def wait(self) -> None:
        if not self.small:
            torch.cuda.synchronize()

    def milliseconds(self, *calls: Callable[[], object], repeat: int = 7) -> float:
        """Of one of the calls, which follow each other: the median, after two that do not count."""
        times = []
        for _ in range(2 + repeat):
            self.wait()
            start = time.perf_counter()
            for call in calls:
                call()
            self.wait()
            times.append(1000 * (time.perf_counter() - start) / len(calls))
        return statistics.median(times[2:])

    def clear(self) -> None:
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()


# ------------------------------------------------------------------------------ random weights


def random_steps(
    kind: str, group: int | None, outputs: int, inputs: int, place: Place, *, zero: bool = False
) -> FewBits:
    """A quantized weight of numbers with a standard deviation of about 0.02."""
    device = place.device
    size = (outputs, inputs // group) if group else (outputs,)
    step = {"int4": 0.0043, "int8": 0.00027, "fp8": 0.0003}[kind]
    scale = (step * (0.5 + torch.rand(size, device=device))).to(place.dtype)
    if kind == "fp8":
        wide = 64 * torch.randn(outputs, inputs, device=device, dtype=place.dtype)
        return FewBits(wide.to(torch.float8_e4m3fn), scale)
    largest = 8 if kind == "int4" else 128
    drawn = torch.randint(-largest, largest, (outputs, inputs), dtype=torch.int8, device=device)
    shift = torch.randint(-3, 4, size, dtype=torch.int8, device=device) if zero else None
    return FewBits(pack_nibbles(drawn) if kind == "int4" else drawn, scale, shift)


def random_model(shape: ModelShape, recipe: Recipe | None, place: Place) -> Decoder:
    """A model as the engine has it, made on the device as it is stored; None: not quantized."""
    if recipe is None:
        return fuse(random_decoder(shape, dtype=place.dtype, device=place.device))
    with torch.device("meta"):
        decoder = Decoder(shape).to(place.dtype)
        for name, module in list(decoder.named_modules()):
            scheme = recipe.scheme_of(name, module)
            if scheme is not None:
                decoder.set_submodule(name, rounded_layer(name, module, scheme))
        decoder = fuse(decoder)
    decoder = decoder.to_empty(device=place.device)
    for module in decoder.modules():
        if isinstance(module, QuantizedLinear):
            steps = module.few_bits()
            kind, group, outputs, inputs = steps.form
            made = random_steps(kind, group, outputs, inputs, place)
            module.weight, module.scale = made.weight, made.scale
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02)
    return fuse(decoder.eval().requires_grad_(False))  # which widens a plain head, now it is there


def recipe_of(name: str, place: Place) -> Recipe:
    """As `xverse quantize --to` means it."""
    recipe = NAMED[name]
    if place.small and recipe.scheme.group_size:
        recipe = replace(recipe, scheme=replace(recipe.scheme, group_size=SMALL_GROUPS))
    return recipe


# --------------------------------------------------------------------------------------- check


def check(place: Place) -> Figures:
    """Distances ||fast - exact|| / ||exact||; exact is fp64 of the very numbers that are stored."""
    found: Figures = {}
    if not place.kernels:
        return {"left out": "the kernels need a GPU, or TRITON_INTERPRET=1"}
    from xverse.kernels import dequantize_triton, multiply_steps_triton, round_triton

    outputs, inputs = (96, 192) if place.small else (4096, 4096)
    for kind, group, zero in (
        ("int4", 128, False), ("int4", 64, True), ("int4", 32, False), ("int4", None, False),
        ("int8", 128, False), ("int8", 32, True), ("int8", None, False), ("fp8", None, False),
    ):  # fmt: skip
        if place.small and group is not None:
            group = min(group, 64)
        steps = random_steps(kind, group, outputs, inputs, place, zero=zero)
        exact_ND = exact_of(steps)
        wide_ND = dequantize_triton.dequantize(steps)
        name = f"{kind} group {group}" + ", zeros" * zero
        found[f"{name}: widened"] = passed(wide_ND, dequantize(steps).to(place.dtype), 0.0, name)
        for rows, multiply in (
            (100, multiply_steps_triton.multiply_steps),
            (300, dequantize_triton.multiply_widened),
        ):
            x = torch.randn(rows, inputs, device=place.device, dtype=place.dtype)
            y = multiply(x, steps)
            error = passed(y, x.double() @ exact_ND.T, 6e-3, f"{name}, {rows} rows")
            found[f"{name}: {rows} rows"] = error
    found |= check_rounded(place, outputs, inputs)
    if not place.small:
        for outputs, inputs in ((22016, 4096), (4096, 11008), (100534, 4096), (1728, 2560)):
            steps = random_steps("int4", 64, outputs, inputs, place)
            for rows in (65, 128, 256, 300):
                x = torch.randn(rows, inputs, device=place.device, dtype=place.dtype)
                chosen = dispatch_quantized.multiply_steps(
                    place.device, place.dtype, rows, steps.form
                )
                exact = x.double() @ exact_of(steps).T
                name = f"{outputs} x {inputs}, {rows} rows"
                found[name] = passed(chosen.call(x, steps), exact, 6e-3, name)
    if not place.small:
        table = torch.randn(1000, inputs).to(place.dtype).pin_memory()
        ids = torch.arange(0, 999, 7, device=place.device)
        looked_up = look_up(ids, table).cpu()
        found["rows of the host"] = passed(looked_up, table[ids.cpu()], 0.0, "rows of the host")
    x = torch.randn(64, inputs, device=place.device, dtype=place.dtype)
    fast, twin = round_triton.round_rows(x), reference_steps.round_rows(x)
    found["rows in 8 bits: bytes apart"] = bytes_apart(fast.values, twin.values)
    return found


def check_rounded(place: Place, outputs: int, inputs: int) -> Figures:
    """Products in 8 bits against fp64 of the rounded numbers, and what makes their inputs."""
    from xverse.kernels import round_triton

    found: Figures = {}
    steps = random_steps("fp8", None, outputs, inputs, place)
    x = torch.randn(512, inputs, device=place.device, dtype=place.dtype)
    rounded = round_triton.round_rows(x)
    exact = rounded.values.double() * rounded.scale.double()[:, None] @ exact_of(steps).T
    product = reference_steps.multiply_rounded if place.small else multiply_rounded.multiply_rounded
    found["8 bits: 512 rows"] = passed(product(rounded, steps), exact, 6e-3, "8 bits")
    found["8 bits, rounding of x included"] = distance(
        product(rounded, steps), x.double() @ exact_of(steps).T
    )
    norm = Norm(torch.rand(inputs, device=place.device).to(place.dtype) + 0.5, 1e-6, False)
    more = torch.randn_like(x)
    for name, fast, twin in (
        ("norm", round_triton.add_norm_rounded(x, more, norm)[1],
         reference_steps.add_norm_rounded(x, more, norm)[1]),
        ("swiglu", round_triton.swiglu_rounded(x), reference_steps.swiglu_rounded(x)),
    ):  # fmt: skip
        wanted = twin.values.double() * twin.scale.double()[:, None]
        made = fast.values.double() * fast.scale.double()[:, None]
        found[f"{name} in 8 bits"] = passed(made, wanted, 1e-2, name)
    return found


def exact_of(steps: FewBits) -> Tensor:
    return dequantize(steps).double()


def distance(fast: Tensor, exact: Tensor) -> float:
    return float((fast.double() - exact.double()).norm() / exact.double().norm())


def passed(fast: Tensor, exact: Tensor, most: float, name: str) -> float:
    """The distance; it is an error if it is larger than allowed, or no number."""
    found = distance(fast, exact)
    if not found <= most:
        print(f"  FAILED {name}: {found:.2e} where {most:.0e} is allowed", flush=True)
    return found


def bytes_apart(fast: Tensor, twin: Tensor) -> float:
    return float((fast.view(torch.uint8) != twin.view(torch.uint8)).float().mean())


# ---------------------------------------------------------------------------------------- rows


def rows(place: Place) -> Figures:
    """Milliseconds of products by number of rows and way."""
    if not place.kernels:
        return {"left out": "the kernels need a GPU, or TRITON_INTERPRET=1"}
    from xverse.kernels import dequantize_triton, multiply_steps_triton, round_triton

    found: Figures = {}
    sizes = {"gate, up": (22016, 4096), "output": (4096, 4096)}
    counts: tuple[int, ...] = (16, 64, 128, 256, 384, 512, 1024)
    if place.small:
        sizes, counts = {"tiny": (96, 192)}, (16, 40)
    for name, (outputs, inputs) in sizes.items():
        plain = [torch.randn(outputs, inputs, device=place.device).to(place.dtype) for _ in COPIES]
        for kind in ("int4", "fp8"):
            group = None if kind == "fp8" else 64 if place.small else 128
            weights = [random_steps(kind, group, outputs, inputs, place) for _ in COPIES]
            for count in counts:
                x = torch.randn(count, inputs, device=place.device, dtype=place.dtype)
                whole = dequantize_triton.MOST_NUMBERS
                registers, parts, once = (
                    [partial(multiply, x, steps) for steps in weights]
                    for multiply in (
                        multiply_steps_triton.multiply_steps,
                        dequantize_triton.multiply_widened,
                        partial(dequantize_triton.multiply_widened, numbers=whole),
                    )
                )
                ways: dict[str, Sequence[Callable[[], object]]] = {
                    "bf16": [partial(functional.linear, x, weight) for weight in plain],
                    "in registers": registers,
                    "widened in parts": parts,
                    "widened whole": once,
                }
                if kind == "fp8" and not place.small:
                    rounded = reference_steps.round_rows(x)
                    product = multiply_rounded.multiply_rounded
                    ways["8 bits"] = [partial(product, rounded, steps) for steps in weights]
                    ways["rounding alone"] = [partial(round_triton.round_rows, x) for _ in COPIES]
                row = {way: round(place.milliseconds(*calls), 4) for way, calls in ways.items()}
                found[f"{name}, {kind}, {count} rows"] = row
                print(f"  {name:9} {kind:5} {count:5} rows  {row}", flush=True)
    if not place.small:
        found["8 bits, 8192 rows"] = ways_in_8_bits(place)
    return found


def ways_in_8_bits(place: Place) -> Figures:
    """TFLOP/s of cuBLAS at the four products of a prompt of 8,192 rows: scales of rows or of the
    whole tensor, all rows at once or in two parts, fast sums or not."""
    found: Figures = {}
    for name, (outputs, inputs) in {
        "q, k, v": (12288, 4096),
        "output": (4096, 4096),
        "gate, up": (22016, 4096),
        "down": (4096, 11008),
    }.items():
        x = torch.randn(8192, inputs, device=place.device).to(torch.float8_e4m3fn)
        w = torch.randn(outputs, inputs, device=place.device).to(torch.float8_e4m3fn)
        row: dict[str, float] = {}
        for of in ("rows", "tensor"):
            for fast in (True, False):
                for parts in (1, 2):
                    key = f"{of}{', fast sums' * fast}, {parts} part{'s' * (parts - 1)}"
                    call = partial(in_8_bits, x, w, by_rows=of == "rows", fast=fast, parts=parts)
                    try:
                        taken = place.milliseconds(*4 * [call])
                    except RuntimeError as error:
                        print(f"  {name} {key}: {str(error).splitlines()[0]}", flush=True)
                        continue
                    row[key] = round(2 * 8192 * outputs * inputs / taken / 1e9, 1)
        found[name] = row
        print(f"  {name}: {row}", flush=True)
    return found


def in_8_bits(x_TD: Tensor, w_ND: Tensor, *, by_rows: bool, fast: bool, parts: int) -> list[Tensor]:
    found = []
    for some in x_TD.chunk(parts):
        rows, outputs = ((len(some), 1), (1, len(w_ND))) if by_rows else ((), ())
        found.append(
            torch._scaled_mm(
                some, w_ND.t(), out_dtype=torch.bfloat16, use_fast_accum=fast,
                scale_a=torch.ones(rows, device=x_TD.device),
                scale_b=torch.ones(outputs, device=x_TD.device),
            )
        )  # fmt: skip
    return found


# ------------------------------------------------------------------------------------- prefill


def prefill(place: Place) -> Figures:
    """Milliseconds from ids to the logits of the last, one prompt, keys and values stored."""
    found: Figures = {}
    tokens = (100, 33) if place.small else (8191, 2048, 512, 128)
    for name in ("bf16", "fp8", "int8", "int4"):
        recipe = None if name == "bf16" else recipe_of(name, place)
        decoder = random_model(place.shape("xverse-7b"), recipe, place)
        pages = -(-tokens[0] // 16) + 1
        kv = Paged(decoder.shape, pages, 16, dtype=place.dtype, device=place.device)
        runner = DeviceRunner(decoder, kv, slots=1, spare=pages - 1)
        runner.tables_SP[0, : pages - 1] = torch.arange(pages - 1, dtype=torch.int32)
        row = {}
        for count in tokens:
            taken = place.milliseconds(partial(read, runner, count), repeat=5)
            row[f"{count} tokens"] = round(taken, 2)
        found[name] = row
        print(f"  {name:5} {row}", flush=True)
        del decoder, kv, runner
        place.clear()
    return found


@torch.inference_mode()
def read(runner: DeviceRunner, count: int) -> Tensor:
    ids = (numpy.arange(count) * 7919 % runner.decoder.shape.vocab_size).astype("i4")
    hidden_TD = runner.prompts(runner._prompt_rows([(0, 0, count)], ids), runner.decoder)
    return runner.decoder.logits(hidden_TD[count - 1 : count])


# -------------------------------------------------------------------------------------- memory

CONTEXT, NEW = 2048, 64
# GiB that a row may take at most while it decodes.
LINES = {
    ("xverse-7b", "bf16"): 15.2,
    ("xverse-7b", "int8"): 8.4,
    ("xverse-7b", "int4"): 5.2,
    ("xverse-7b", "int4, embeddings on the host"): 5.2,
    ("xverse-7b", "int4, int8 embeddings"): 5.2,
    ("xverse-7b", "int4, int8 embeddings, fp8 KV"): 4.6,
    ("xverse-13b-2", "bf16"): 27.8,
    ("xverse-13b-2", "int8"): 15.3,
    ("xverse-13b-2", "int4"): 9.4,
}


def ways(name: str, place: Place) -> Iterator[tuple[str, Recipe | None, bool]]:
    """Name, recipe, and whether keys and values are fp8."""
    int8, int4 = recipe_of("int8", place), recipe_of("int4", place)
    small = Scheme(8)
    yield "bf16", None, False
    yield "int8", int8, False
    yield "int4", int4, False
    yield "int4, int8 embeddings, fp8 KV", replace(int4, embedding=small), True
    if name == "xverse-7b":
        yield "int4, int8 embeddings", replace(int4, embedding=small), False
        yield "int4, embeddings on the host", int4, False
        yield "int4, int4 head", replace(int4, head=int4.scheme), False
        yield "int8, 16-bit head", replace(int8, head=None), False
        yield "int8, int8 embeddings, fp8 KV", replace(int8, embedding=small), True


def memory(place: Place) -> Figures:
    """GiB: weights, then peaks. `decoding`: from the first new token to the last; `in all`: from
    before the engine was made, its prompt included."""
    found: Figures = {}
    decoder: Decoder | None = None
    for name in ("xverse-7b", "xverse-13b-2"):
        for way, recipe, fp8 in ways(name, place):
            try:
                decoder = random_model(place.shape(name), recipe, place)
                if way.endswith("on the host") and not place.small:
                    keep_on_host(decoder)
                row = decode_peaks(decoder, place, fp8=fp8)
            except Exception as error:
                traceback.print_exc()
                found[f"{name}, {way}"] = {"failed": repr(error)}
                continue
            finally:
                decoder = None
                place.clear()
            line = LINES.get((name, way))
            verdict = "" if line is None else f"  line {line}"
            if line is not None and float(row["decoding"]) > line:
                verdict += "  ABOVE THE LINE"
            found[f"{name}, {way}"] = row | ({} if line is None else {"line": line})
            print(f"  {name:13} {way:40} {row}{verdict}", flush=True)
    return found


def decode_peaks(decoder: Decoder, place: Place, *, fp8: bool) -> dict[str, float | str]:
    """One request of CONTEXT tokens and NEW answers through an engine with room for no more."""
    context, new = (64, 8) if place.small else (CONTEXT, NEW)
    reset(place)
    options = EngineOptions(kv_tokens=context + new, kv_dtype="fp8" if fp8 else "auto")
    engine = Engine(prepare(decoder), options=options)
    sampling = Sampling(temperature=0.0, max_tokens=new, ignore_eos=True, repetition_penalty=1.0)
    ids = tuple((torch.arange(context) * 7919 % decoder.shape.vocab_size).tolist())
    engine.add(Request(ids, sampling.over({})))
    tokens = 0
    before, decoding = 0, 0
    start = time.perf_counter()
    while engine.busy:
        tokens += sum(isinstance(output, Token) for output in engine.step())
        if tokens == 2 and not before:  # the step is captured by now, where steps are
            place.wait()
            before = peak(place)
            reset(place)
            start = time.perf_counter()
    place.wait()
    taken = time.perf_counter() - start
    decoding = peak(place)
    assert tokens == new, f"{tokens} tokens of {new}"
    return {
        "weights": gib(weight_bytes(decoder)),
        "keys and values": gib(engine.kv.nbytes),
        "decoding": gib(decoding),
        "in all": gib(max(before, decoding)),
        "reserved": gib(0 if place.small else torch.cuda.max_memory_reserved()),
        "tokens_per_s": round((new - 2) / taken, 1),
        "runner": type(engine.runner).__name__,
    }


def reset(place: Place) -> None:
    if not place.small:
        torch.cuda.reset_peak_memory_stats()


def peak(place: Place) -> int:
    return 0 if place.small else torch.cuda.max_memory_allocated()


def gib(count: int) -> float:
    return round(count / 2**30, 3)


# ----------------------------------------------------------------------------------- calibrate


def calibrate(place: Place) -> Figures:
    """Seconds of GPTQ, int4 in groups, head included; blocks in memory already."""
    shape = place.shape("xverse-7b")
    blocks = shape.num_hidden_layers
    measured = blocks if place.full or place.small else 3
    few = replace(shape, num_hidden_layers=measured)
    decoder = random_decoder(few, dtype=place.dtype, device=place.device)
    count, length = (4, 96) if place.small else (128, 2048)
    numbers = torch.Generator().manual_seed(0)
    samples = torch.randint(0, shape.vocab_size, (count, length), generator=numbers).tolist()
    recipe = recipe_of("int4", place)
    start = time.perf_counter()
    passage = Passage(decoder, samples)
    place.wait()
    embedding_s = time.perf_counter() - start
    times = []
    for block in decoder.model.layers:
        start = time.perf_counter()
        quantize_block(block, recipe.scheme, "gptq", passage)
        place.wait()
        times.append(time.perf_counter() - start)
        print(f"  block {len(times)}: {times[-1]:.2f} s", flush=True)
    start = time.perf_counter()
    quantize_ends(decoder, recipe, "gptq")
    place.wait()
    ends_s = time.perf_counter() - start
    # The first block also compiles and warms up; the others stand for the rest.
    rest = statistics.mean(times[1:]) if len(times) > 1 else times[0]
    total = embedding_s + times[0] + rest * (blocks - 1) + ends_s
    return {
        "samples": f"{count} x {length} random ids",
        "embedding_s": round(embedding_s, 2),
        "blocks_s": [round(one, 2) for one in times],
        "ends_s": round(ends_s, 2),
        "blocks": blocks,
        "total_s": round(total, 1),
        "computed": "measured" if measured == blocks else f"from {measured} blocks of {blocks}",
        "peak_GiB": gib(peak(place)),
        "line_s": 600,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--small", action="store_true", help="a tiny shape, on a CPU")
    parser.add_argument("--full", action="store_true", help="calibrate every block")
    args = parser.parse_args()
    place = Place(small=args.small, full=args.full)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    chosen = args.sections.split(",")
    assert set(chosen) <= set(SECTIONS), f"sections are {SECTIONS}"
    name = "quant_h200" if len(chosen) == len(SECTIONS) else f"quant_h200_{'_'.join(chosen)}"
    found: Figures = {
        "what": "random weights, XVERSE shapes, one GPU" if not args.small else "tiny"
    }
    for section in chosen:
        start = time.perf_counter()
        print(f"{section}:", flush=True)
        # Triton's interpreter knows no products of bf16, and our CPU kernels no float16.
        interpreted = place.small and section in ("check", "rows")
        place.dtype = torch.float16 if interpreted else torch.bfloat16
        try:
            figures: object = globals()[section](place)
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": repr(error)}
        seconds = round(time.perf_counter() - start, 1)
        found[section] = {"seconds": seconds, "figures": figures}
        print(f"{section}: {json.dumps(figures)}\n{section} took {seconds} s", flush=True)
        place.clear()
        if not args.small:
            print(record(name, found, ("triton",)), flush=True)


if __name__ == "__main__":
    main()
