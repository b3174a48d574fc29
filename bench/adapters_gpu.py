"""ADAPTERS ON A GPU: right, how fast beside none, and changed while others are answered.

    python -m bench.adapters_gpu [--sections check,answers,layers,decode,swaps,frozen] [--small]

    check    40 s   kernels against fp64 at 7B's layers; bits that depend on no neighbour
    answers  40 s   a small model: greedy ids of eight adapters together, by captured steps
    layers   30 s   microseconds of what adapters add behind a layer, in a CUDA graph
    decode  150 s   7B: tokens/s of 1, 8 and 64 rows without, with one and with eight adapters, and
                    with one as without slots
    swaps    40 s   7B: ten names given to another adapter while 32 rows decode
    frozen   20 s   products of frozen int4 layers and their gradient: by the kernel and plainly

Seconds are guesses, compiling included. Weights and adapters are random. `--small` goes the same
way with a tiny shape on a CPU, by the plain twins; the kernels are tried in tests/kernels there.
What a section found is in bench/results before the next begins.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from bench.quant_gpu import TINY
from bench.record import record
from tests.checkpoint.adapters import random_adapter
from xverse.checkpoint.adapter import Adapter
from xverse.engine.agree import judge
from xverse.engine.captured import captured
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.measure import measure_throughput
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Token
from xverse.engine.workload import apart, make_requests
from xverse.kernels import dispatch, dispatch_quantized, reference_adapt, reference_steps
from xverse.kernels.choice import Choice
from xverse.kernels.reference_adapt import JOINED, Slots, empty_slots
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder
from xverse.model.fresh import random_decoder
from xverse.model.fuse import fuse
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear
from xverse.quant.scheme import Scheme

SECTIONS = ("check", "answers", "layers", "decode", "swaps", "frozen")
RANK, MOST = 16, 8
SMALL = replace(
    TINY, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip
Figures = dict[str, object]


class Place:
    """Where it runs, and how large."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.device = torch.device("cpu" if small else "cuda")
        self.shape = TINY if small else CATALOG["XVERSE-7B"]
        self.dtype = torch.bfloat16
        if small:  # the runner of a GPU, by the plain twins
            setattr(DeviceRunner, "why_not", lambda decoder, kv: "")  # noqa: B010 - for mypy

    @property
    def layers(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Inputs and joined outputs of a block's layers, as they are fused."""
        wide, inner = self.shape.hidden_size, self.shape.intermediate_size
        return {
            "qkv": (wide, (wide, wide, wide)),
            "o": (wide, (wide,)),
            "gate_up": (wide, (inner, inner)),
            "down": (inner, (wide,)),
        }

    def adding(self) -> Callable[..., None]:
        call: Callable[..., None] = dispatch.add_adapters(self.device, self.dtype).call
        return call

    def wait(self) -> None:
        if not self.small:
            torch.cuda.synchronize()

    def microseconds(self, run: Callable[[], Tensor], repeat: int = 9) -> float:
        """Of a run, as a CUDA graph: the median of means of ten, after one that does not count."""
        replay = run if self.small else captured(run)
        times, each = [], 1 if self.small else 10
        for _ in range(1 + (1 if self.small else repeat)):
            self.wait()
            start = time.perf_counter()
            for _ in range(each):
                replay()
            self.wait()
            times.append(1e6 * (time.perf_counter() - start) / each)
        return round(statistics.median(times[1:]), 2)

    def engine(
        self, decoder: Decoder, *, running: int, adapters: int, slots: int | None = None
    ) -> Engine:
        """With adapters 0, 1, ... loaded."""
        told = EngineOptions(
            kv_tokens=running * 512, max_running=running, max_adapters=adapters,
            adapter_bytes=2**33, adapter_rank=RANK, adapter_slots=slots,
        )  # fmt: skip
        made = Engine(decoder, options=told)
        assert isinstance(made.runner, DeviceRunner)
        for number in range(adapters):
            made.load_adapter(str(number), adapter_of(decoder.shape, number))
        return made

    def peak_MiB(self, run: Callable[[], object]) -> float:
        """The most memory that a run takes beside what is taken already; 0 on a CPU."""
        if self.small:
            run()
            return 0.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def clear(self) -> None:
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()


@cache
def adapter_of(shape: ModelShape, seed: int, rank: int = RANK) -> Adapter:
    """One whose additions are about a tenth of what they are added to."""
    return random_adapter(
        shape, seed=seed, rank=rank, size=0.1 / (rank * shape.hidden_size) ** 0.25
    )


# ------------------------------------------------------------------------------------- sections


def check(place: Place) -> Figures:
    """The kernel's error beside fp64, of the largest number, and beside the twin's own."""
    found: Figures = {}
    add = place.adding()
    for name, (inputs, outputs) in place.layers.items():
        for rank, tokens in ((16, 1), (64, 8), (16, 64), (64, 200), (16, 300), (64, 2048)):
            if place.small and tokens > 64:
                continue
            slots = random_slots(place, inputs, outputs, rank)
            slot_T = mixed(tokens, len(slots.a_SLRD), place)
            x_TD = torch.randn(tokens, inputs, device=place.device).to(place.dtype)
            y_TN = torch.randn(tokens, sum(outputs), device=place.device).to(place.dtype)
            ours, twin, exact = y_TN.clone(), y_TN.clone(), y_TN.double()
            add(ours, x_TD, slot_T, slots)
            reference_adapt.add_adapters(twin, x_TD, slot_T, slots)
            add_exactly(exact, x_TD.double(), slot_T, slots)
            error, twins = (float((y - exact).norm() / exact.norm()) for y in (ours, twin))
            assert error < 2 * twins + 1e-6, (name, rank, tokens, error, twins)
            for slot in (0, 3):  # the same bits without the others
                rows, alone = slot_T == slot, y_TN.clone()
                add(alone, x_TD, torch.where(rows, slot_T, -1), slots)
                assert torch.equal(alone[rows], ours[rows]), (name, rank, tokens, slot)
                assert torch.equal(alone[~rows], y_TN[~rows])
            found[f"{name} rank {rank}, {tokens} rows"] = f"{error:.1e} (twin {twins:.1e})"
    return found


def answers(place: Place) -> Figures:
    """Greedy ids of eight adapters and of none together, beside the plain path of each alone."""
    shape = TINY if place.small else SMALL
    dtype = torch.float32 if place.small else torch.bfloat16
    decoder = fuse(random_decoder(shape, dtype=dtype, device=place.device, std=0.08))
    fast = place.engine(decoder, running=32, adapters=MOST)
    slow = place.engine(decoder, running=32, adapters=MOST, slots=0)
    tokens = 6 if place.small else 32
    asked = make_requests(9 if place.small else 27, (5, 70), (tokens, tokens), vocabulary=300)
    asked = [named(request, number % 9 - 1) for number, request in enumerate(asked)]
    ids = [answer.ids for answer in measure_throughput(fast, asked).answers]
    ties = changed = 0
    for request, own in zip(asked, ids, strict=True):
        if request.adapter is None:
            judged = judge(decoder, request, own)
        else:
            with slow.adapters.over([slow.adapters.hold(request.adapter)]) as twin:
                judged = judge(twin, request, own)
            changed += judged.plain_ids != judge(decoder, request, own).plain_ids
        assert judged.sound, (request.adapter, str(judged))
        ties += judged.ties
    assert changed, "adapters that change nothing prove nothing"
    return {"answers": len(asked), "near_ties": ties, "changed": changed}


def layers(place: Place) -> Figures:
    found: Figures = {}
    add = place.adding()
    for name, (inputs, outputs) in place.layers.items():
        for rank in (16, 64):
            slots, times = random_slots(place, inputs, outputs, rank), {}
            for tokens in (1, 8, 64, 512, 4096):
                if place.small and tokens > 8:
                    continue
                x_TD = torch.randn(tokens, inputs, device=place.device).to(place.dtype)
                y_TN = torch.zeros(tokens, sum(outputs), device=place.device, dtype=place.dtype)
                for adapters in {1, min(MOST, tokens)}:
                    slot_T = (torch.arange(tokens, device=place.device) % adapters).int()
                    run = adding_to(y_TN, x_TD, slot_T, slots, add)
                    times[f"{tokens} rows, {adapters} adapters"] = place.microseconds(run)
            found[f"{name} rank {rank}"] = times
            print(f"  {name} rank {rank}: {times}", flush=True)
    return found


def decode(place: Place) -> Figures:
    decoder = fuse(random_decoder(place.shape, dtype=torch.bfloat16, device=place.device))
    found: Figures = {}
    for rows in (1, 8, 64):
        if place.small and rows > 8:
            continue
        engine = place.engine(decoder, running=rows, adapters=MOST)
        speeds = {"none": decoding(engine, rows, 0, place)}
        speeds["one"] = decoding(engine, rows, 1, place)
        if rows >= MOST:
            speeds["eight"] = decoding(engine, rows, MOST, place)
        speeds["none again"] = decoding(engine, rows, 0, place)
        slots = engine.adapters.slots
        found["slots_GiB"] = None if slots is None else round(slots.nbytes / 2**30, 3)
        del engine, slots
        place.clear()
        engine = place.engine(decoder, running=rows, adapters=1, slots=0)
        speeds["one, without slots"] = decoding(engine, rows, 1, place)
        del engine
        place.clear()
        found[f"{rows} rows, tokens/s"] = speeds
        print(f"  {rows} rows: {speeds}", flush=True)
    return found


def swaps(place: Place) -> Figures:
    """Names change hands while others are answered: seconds of loading, and of the step after."""
    decoder = fuse(random_decoder(place.shape, dtype=torch.bfloat16, device=place.device))
    rows, tokens, between = (4, 24, 1) if place.small else (32, 200, 8)
    engine = place.engine(decoder, running=rows + 1, adapters=4)
    others = [adapter_of(place.shape, seed) for seed in (20, 21)]
    asked = make_requests(rows, (20, 40), (tokens, tokens), vocabulary=300)
    for number, request in enumerate(asked):
        engine.add(named(request, number % 5 - 1))
    came, loads, steps, usual = 0, [], [], []

    def step() -> float:
        nonlocal came
        start = time.perf_counter()
        outputs = engine.step()
        place.wait()
        assert all(isinstance(output, Token) for output in outputs), outputs
        came += len(outputs)
        return 1000 * (time.perf_counter() - start)

    for _ in range(2 * between):  # prompts, and what is captured once
        step()
    for swap in range(10):
        start = time.perf_counter()
        engine.load_adapter("0", others[swap % 2], replace=True)
        place.wait()
        loads.append(1000 * (time.perf_counter() - start))
        more = make_requests(1, (20, 40), (4, 4), vocabulary=300, seed=swap)
        engine.add(named(more[0], 0))
        steps.append(step())  # a prompt of the new adapter, whose slot is written
        usual += [step() for _ in range(between)]
    while engine.busy:
        step()
    assert came == rows * tokens + 10 * 4, "no request fails"
    times = {"load": loads, "step after": steps, "other steps": usual}
    return {f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}


def frozen(place: Place) -> Figures:
    """Milliseconds forward and backward of a frozen int4 layer, and how far from fp64."""
    found: Figures = {}
    kernel = dispatch_quantized.widen
    for name, (inputs, outputs) in place.layers.items():
        dtype, tokens = torch.bfloat16, 16 if place.small else 2048
        weight_ND = 0.02 * torch.randn(outputs[0], inputs, device=place.device)
        layer = QuantizedLinear.of(Linear.of(weight_ND.to(dtype), None), Scheme(4, 64))
        x_TD = torch.randn(tokens, inputs, device=place.device, dtype=dtype)
        upstream = torch.randn(tokens, outputs[0], device=place.device, dtype=dtype)
        exact_ND = layer.dequantized().double()
        wanted = x_TD.double() @ exact_ND.T, upstream.double() @ exact_ND
        for way, widen in (("kernel", kernel), ("plain", plainly)):
            dispatch_quantized.widen = widen  # type: ignore[assignment]
            learn = partial(forward_and_back, layer, x_TD, upstream)
            errors = [
                float((ours - exact).norm() / exact.norm())
                for ours, exact in zip(learn(), wanted, strict=True)
            ]
            assert max(errors) < 1e-2, errors
            times = []
            for _ in range(1 if place.small else 9):
                place.wait()
                start = time.perf_counter()
                learn()
                place.wait()
                times.append(1000 * (time.perf_counter() - start))
            found[f"{name}, {way}"] = {
                "ms": round(statistics.median(times), 3),
                "peak_MiB": place.peak_MiB(learn),
                "errors": [f"{error:.1e}" for error in errors],
            }
        dispatch_quantized.widen = kernel
    return found


def forward_and_back(
    layer: QuantizedLinear, x_TD: Tensor, upstream_TN: Tensor
) -> tuple[Tensor, Tensor]:
    """y, and the gradient by x."""
    x = x_TD.detach().requires_grad_()
    y_TN = layer(x)
    return y_TN.detach(), torch.autograd.grad(y_TN, x, upstream_TN)[0]


# ---------------------------------------------------------------------------------------- parts


def random_slots(place: Place, inputs: int, outputs: tuple[int, ...], rank: int) -> Slots:
    """MOST slots of this rank, the second of a smaller one, the third of one joined layer alone."""
    ranks_SL = torch.zeros(MOST, JOINED, dtype=torch.int32)
    ranks_SL[:, : len(outputs)] = rank
    ranks_SL[1, : len(outputs)] = rank // 2 + 1
    ranks_SL[2, 1:] = 0
    like = torch.empty(0, dtype=place.dtype, device=place.device)
    slots = empty_slots(MOST, rank, inputs, outputs, like, ranks_SL.to(place.device))
    slots.a_SLRD.normal_(0, inputs**-0.5)
    slots.b_SRN.normal_(0, rank**-0.5)
    slots.gain_SN[3].uniform_(0.5, 1.5)
    for part in range(len(outputs)):
        slots.a_SLRD[1, part, rank // 2 + 1 :] = 0
    slots.b_SRN[1, rank // 2 + 1 :] = 0
    return slots


def mixed(tokens: int, count: int, place: Place) -> Tensor:
    """Rows of all slots and of none, in no order."""
    drawn = torch.Generator().manual_seed(tokens)
    return torch.randint(-1, count, (tokens,), generator=drawn).int().to(place.device)


def add_exactly(y_TN: Tensor, x_TD: Tensor, slot_T: Tensor, slots: Slots) -> None:
    """The same in fp64, nothing rounded."""
    for slot in range(len(slots.a_SLRD)):
        rows, first = (slot_T == slot).nonzero()[:, 0], 0
        for part, last in enumerate(slots.ends):
            rank = int(slots.ranks_SL[slot, part])
            if rank:
                low_TR = x_TD[rows] @ slots.a_SLRD[slot, part, :rank].double().T
                more_TN = low_TR @ slots.b_SRN[slot, :rank, first:last].double()
                gain_N = slots.gain_SN[slot, first:last].double()
                y_TN[rows, first:last] = (y_TN[rows, first:last] + more_TN) * gain_N
            first = last


def adding_to(
    y_TN: Tensor, x_TD: Tensor, slot_T: Tensor, slots: Slots, add: Callable[..., None]
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        add(y_TN, x_TD, slot_T, slots)
        return y_TN

    return run


def plainly(device: torch.device, dtype: torch.dtype, kind: str) -> Choice:
    return Choice("", "", "", reference_steps.widen)


def named(request: Request, number: int) -> Request:
    """With the adapter of this number; below 0 with none."""
    return request if number < 0 else replace(request, adapter=str(number))


def decoding(engine: Engine, rows: int, adapters: int, place: Place) -> float:
    """Tokens a second of steps of so many rows, prompts apart: the best of two runs, since the
    first one also captures."""
    tokens = 6 if place.small else 128
    asked = make_requests(rows, (32, 32), (tokens, tokens), vocabulary=300)
    if adapters:
        asked = [named(request, number % adapters) for number, request in enumerate(asked)]
    speeds = []
    for run in range(2):
        timed = measure_throughput(engine, apart(asked, f"{adapters} {run}"))
        speeds.append(rows / statistics.median(timed.tpots_s))
    return round(max(speeds), 1)


def run_sections(chosen: Sequence[str], place: Place) -> None:
    name = "adapters_h200" if len(chosen) == len(SECTIONS) else f"adapters_h200_{'_'.join(chosen)}"
    found: Figures = {"what": "random weights and adapters, XVERSE-7B's shape, rank 16, one GPU"}
    for section in chosen:
        start = time.perf_counter()
        print(f"{section}:", flush=True)
        try:
            with torch.set_grad_enabled(section == "frozen"):
                figures: object = globals()[section](place)
        except Exception as error:
            traceback.print_exc()
            figures = {"failed": repr(error)}
        seconds = round(time.perf_counter() - start, 1)
        found[section] = {"seconds": seconds, "figures": deepcopy(figures)}
        print(f"{section}: {json.dumps(figures)}\n{section} took {seconds} s", flush=True)
        place.clear()
        if not place.small:
            print(record(name, found, ("triton",)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--small", action="store_true", help="a tiny shape, on a CPU")
    args = parser.parse_args()
    chosen = args.sections.split(",")
    assert set(chosen) <= set(SECTIONS), f"sections are {SECTIONS}"
    torch.manual_seed(0)
    run_sections(chosen, Place(small=args.small))


if __name__ == "__main__":
    main()
