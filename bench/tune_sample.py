"""HOW FAST IS A CHOICE? The kernels that choose tokens: equal to their twins, and microseconds.

First thousands of rows against the plain twins, then the time of a batch, as one CUDA graph, at
XVERSE's vocabulary. `python -m bench.tune_sample cuts` tries other cuts of the work instead.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xverse.kernels import change_triton, reference_sample, sample_triton
from xverse.kernels.sample_triton import Cut, Scratch

VOCAB, DEVICE = 100_534, torch.device("cuda")
BATCHES = (1, 8, 64, 256, 1024)
Options = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
CHAT: Options = (0.5, 30, 0.85, 0.0)  # as the published models ask for
NUCLEUS: Options = (1.0, 0, 0.9, 0.0)
CHECKED: list[Options] = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    CHAT,
    NUCLEUS,
    (1.0, 0, 0.99, 0.0),
    (0.7, 0, 1.0, 0.05),
    (1.0, 5, 1.0, 0.0),
    (1.3, 6000, 0.95, 0.0),
    (1.0, 50_000, 0.999, 0.01),
    (0.8, 40, 0.9, 0.2),
]
ROUNDING = 1e-5


def peaked(rows: int) -> Tensor:
    """As of a chat model: a few tokens stand out, thousands do not."""
    x = torch.randn(rows, VOCAB, device=DEVICE) * 2
    best = torch.randint(VOCAB, (rows, 200), device=DEVICE)
    return x.scatter_add_(1, best, torch.rand(rows, 200, device=DEVICE) ** 3 * 20)


def flat(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, device=DEVICE)


def tied(rows: int) -> Tensor:
    return flat(rows).mul_(2).round_()


def banned(rows: int) -> Tensor:
    x = peaked(rows)
    return x.masked_fill_(torch.rand_like(x) < 0.9995, float("-inf"))


def sample(arguments: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
    logits, temperature, top_k, top_p, min_p, points = arguments
    return sample_triton.sample_rows(
        logits, temperature, top_k, top_p, min_p, points, scratch=scratch
    )


def columns(options: list[Options]) -> list[Tensor]:
    return list(torch.tensor(options, dtype=torch.float64, device=DEVICE).T.contiguous())


def check_choices(dtype: torch.dtype) -> None:
    """Equal ids, or the point within rounding of an edge between two tokens."""
    rows, differ = 3 * len(CHECKED), 0
    for make in (peaked, flat, tied, banned):
        logits = make(rows).to(dtype)
        logits[-1, 77] = float("nan")
        options = CHECKED * 3
        points = torch.rand(rows, dtype=torch.float64, device=DEVICE)
        arguments = (logits, *columns(options), points)
        fast, again = (sample(arguments) for _ in range(2))
        assert torch.equal(fast, again), "equal inputs give equal ids"
        assert fast[-1] == -1
        host, places = logits.cpu(), points.tolist()
        for row, id in enumerate(fast.tolist()):
            twin = reference_sample.choose_row(host[row], *options[row], places[row])
            if id == twin:
                continue
            differ += 1
            places_near = (places[row] - ROUNDING, places[row] + ROUNDING)
            near = [
                reference_sample.choose_row(host[row], *options[row], place)
                for place in places_near
            ]
            assert min(near) <= id <= max(near), (make, row, options[row], id, twin)
        best = sample_triton.best_rows(logits)
        assert torch.equal(best.cpu(), reference_sample.best_rows(host))
    print(f"choices of {dtype}: {4 * rows} rows, {differ} off by what rounding does")


def check_changes() -> None:
    logits = flat(7)
    counts = torch.randint(-32768, 32767, (9, VOCAB), device=DEVICE).to(torch.int16)
    counts *= torch.rand(9, VOCAB, device=DEVICE) < 0.01
    slots = torch.tensor([8, 0, 1, 5, 3, 4, 2], device=DEVICE)
    penalties = [torch.rand(7, dtype=torch.float64, device=DEVICE) + x for x in (0.5, 0, 0)]
    twin = reference_sample.penalize_rows(
        logits.cpu(), counts.cpu(), slots.cpu(), *(p.cpu() for p in penalties)
    )
    fast = change_triton.penalize_rows(logits.clone(), counts, slots, *penalties)
    assert torch.equal(fast.cpu(), twin)
    ids = torch.tensor([5, -1, 7, 9, 11, VOCAB - 1, 0], device=DEVICE)
    twin = reference_sample.count_rows(counts.cpu(), slots.cpu(), ids.cpu())
    assert torch.equal(change_triton.count_rows(counts, slots, ids).cpu(), twin)
    masks = torch.randint(-(2**31), 2**31, (7, -(-VOCAB // 32)), device=DEVICE).int()
    twin = reference_sample.mask_rows(logits.cpu(), masks.cpu())
    assert torch.equal(change_triton.mask_rows(logits, masks).cpu(), twin)
    print("masks, penalties and counts: equal")


def microseconds(work: Callable[[], object], *, graph: bool = True, repeats: int = 5) -> float:
    """Of one call, among several in one CUDA graph, or as they are launched."""
    work()

    def several() -> None:
        for _ in range(repeats):
            work()

    run: Callable[[], None] = several
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            several()
        run = captured.replay
    times = []
    for _ in range(6):  # the first is not counted
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / repeats)
    return sorted(times[1:])[2]


def by_torch(logits: Tensor, option: Options) -> Tensor:
    """What is usually written: sort, sum, cut, draw. Ties are not minded, top_k is left out."""
    values, order = (logits.float() / option[0]).sort(-1, descending=True)
    probabilities = values.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities > option[2]
    drawn = probabilities.masked_fill_(beyond, 0.0).multinomial(1)
    return order.gather(1, drawn)


def cases(rows: int, cut: Cut) -> dict[str, Callable[[], object]]:
    """What a step of so many rows may ask for."""
    logits, even = peaked(rows).bfloat16(), flat(rows).bfloat16()
    points = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    chat, nucleus, free = (
        [*columns([option] * rows), points] for option in (CHAT, NUCLEUS, (1.0, 0, 1.0, 0.0))
    )
    lists = Scratch.reserve(rows, VOCAB, DEVICE, cut)
    bests = Scratch.reserve(rows, VOCAB, DEVICE, cut, greedy=True)
    counts = torch.zeros(rows, VOCAB, dtype=torch.int16, device=DEVICE)
    counts[:, ::200] = 1
    slots = torch.arange(rows, device=DEVICE)
    repetition, presence, frequency = (points.new_full((rows,), x) for x in (1.1, 0.5, 0.1))

    def penalized() -> None:
        changed = logits.float()
        change_triton.penalize_rows(changed, counts, slots, repetition, presence, frequency)
        change_triton.count_rows(counts, slots, sample([changed, *chat], lists))

    return {
        "greedy": lambda: sample_triton.best_rows(logits, scratch=bests),
        "torch argmax": lambda: logits.argmax(-1),
        "temperature": lambda: sample([logits, *free], lists),
        "chat": lambda: sample([logits, *chat], lists),
        "chat, flat": lambda: sample([even, *chat], lists),
        "chat, penalties": penalized,
        "top_p": lambda: sample([logits, *nucleus], lists),
        "top_p, flat": lambda: sample([even, *nucleus], lists),
        "torch sort": lambda: by_torch(logits, NUCLEUS),
    }


def measure(cut: Cut) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for rows in BATCHES:
        for name, work in cases(rows, cut).items():
            if cut == Cut() or "torch" not in name:
                # What sorts asks the host in between, and cannot be captured.
                time = microseconds(work, graph=name != "torch sort")
                found.setdefault(name, []).append(time)
    return found


def show(found: dict[str, list[float]]) -> None:
    print("us".ljust(18) + "".join(f"B={rows}".rjust(10) for rows in BATCHES))
    for name, times in found.items():
        print(name.ljust(18) + "".join(f"{time:.1f}".rjust(10) for time in times))


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:] == ["cuts"]:
        cuts = [Cut(tile=4096, tile_warps=4), Cut(tile=8192, tile_warps=16), Cut(warps=4)]
        cuts += [Cut(warps=16, block=4096), Cut(part=512), Cut(block=4096)]
        for cut in cuts:
            print(cut)
            show(measure(cut))
        return
    check_changes()
    for dtype in (torch.bfloat16, torch.float32):
        check_choices(dtype)
    show(measure(Cut()))
    size = BATCHES[-1] * VOCAB * 2
    print(f"reading {size / 1e6:.0f} MB of logits at 4.27 TB/s takes {size / 4.27e6:.0f} us")


if __name__ == "__main__":
    main()
