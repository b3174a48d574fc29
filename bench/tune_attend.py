"""WHICH CUT IS FASTEST? The attention kernels on this GPU at XVERSE-7B's shape, bf16 and FP8 pages.

First every kernel against its twin (`bench/check_attend.py`), then GB/s of keys and values of a
decode step, TFLOP/s of prompts (causal: half the products) beside PyTorch's own attention, and GB/s
of storing. Each launch is measured in a CUDA graph over more memory than the cache holds. The
winners go into `kernels/cuts.py` by hand, and the table is recorded.
"""

import multiprocessing
import time

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import check_attend
from bench.attend_cases import (
    BYTES,
    CONTEXTS,
    HEADS,
    SIZE,
    Decode,
    Job,
    Pages,
    Prompt,
    Store,
    alike,
    decodes,
    lengths,
    prompts,
    stores,
    tables_of_rope,
)
from bench.check_attend import Check
from bench.record import record
from bench.tune_decode import seconds
from xverse.kernels import attend_triton, chunks_triton
from xverse.kernels.cuts import Scratch


def measure_decode(job: Decode, pages: Pages, tokens_B: Tensor) -> float:
    """GB/s of keys, values and scales."""
    positions = tokens_B.int().cuda()
    qkv = torch.randn(job.rows, 3 * HEADS * SIZE, device="cuda").bfloat16()
    rope = tables_of_rope(int(tokens_B.max()) + 1)
    scratch = Scratch.reserve(job.rows, HEADS, HEADS, SIZE, "cuda", cut=job.cut)

    def work() -> None:
        for keys, values in zip(pages.keys, pages.values, strict=True):
            attend_triton.rotate_store_attend(
                qkv, *rope, positions, pages.tables, keys, values, pages.scales,
                scratch=scratch, pdl=job.rows <= 16,
            )  # fmt: skip

    return pages.bytes / seconds(work, pages.layers) / 1e9


def measure_prompt(job: Prompt, pages: Pages) -> float:
    """TFLOP/s, counting what causal attention needs."""
    q = torch.randn(job.prompts * job.tokens, HEADS, SIZE, device="cuda").bfloat16()
    offsets = torch.arange(job.prompts + 1, device="cuda", dtype=torch.int32) * job.tokens
    held = torch.zeros(job.prompts, device="cuda", dtype=torch.int32)

    def work() -> None:
        for keys, values in zip(pages.keys, pages.values, strict=True):
            chunks_triton.attend_chunks(
                q, keys, values, pages.tables, offsets, held, pages.scales,
                most=job.tokens, cut=job.cut,
            )  # fmt: skip

    return flops(job.prompts, job.tokens) / seconds(work, pages.layers) / 1e12


def flops(count: int, tokens: int) -> float:
    return count * 2.0 * tokens**2 * HEADS * SIZE


def measure_store(job: Store, pages: Pages) -> float:
    """GB/s read and written."""
    tokens = 8192
    qkv = torch.randn(tokens, 3 * HEADS * SIZE, device="cuda").bfloat16()
    positions = torch.arange(tokens, device="cuda", dtype=torch.int32)
    slots = pages.tables[0].long().repeat_interleave(16)[:tokens] * 16 + positions % 16
    rope = tables_of_rope(tokens)

    def work() -> None:
        chunks_triton.rotate_store(
            qkv, *rope, positions, slots, pages.keys[0], pages.values[0], pages.scales,
            block=job.block, warps=job.warps,
        )  # fmt: skip

    moved = qkv.nbytes + qkv.nbytes // 3 + pages.bytes
    return moved / seconds(work, 1) / 1e9


def measure_plain(count: int, tokens: int) -> dict[str, float]:
    """PyTorch's attention of dense tensors, by backend, and cuDNN's first call for a new length."""
    found: dict[str, float] = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION),
                          ("flash", SDPBackend.FLASH_ATTENTION)):  # fmt: skip
        q, k, v = torch.randn(3, count, HEADS, tokens, SIZE, device="cuda").bfloat16()
        with sdpa_kernel(backend):
            each = seconds(lambda: functional.scaled_dot_product_attention(
                q, k, v, is_causal=True), 1)  # noqa: B023  # fmt: skip
            found[f"{name} TFLOP/s"] = flops(count, tokens) / each / 1e12
            q, k, v = (x[:, :, : tokens - 7].contiguous() for x in (q, k, v))
            torch.cuda.synchronize()
            start = time.perf_counter()
            functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.cuda.synchronize()
            found[f"{name} first call, ms"] = (time.perf_counter() - start) * 1e3
    return found


def prepare(job: Job) -> list[str]:
    """Check a shape, or fill Triton's cache on disk, for the process that measures."""
    torch.set_num_threads(1)
    try:
        if isinstance(job, Check):
            return check_attend.run(job)
        short = torch.full((job.rows if isinstance(job, Decode) else 1,), 40)
        page = job.page if isinstance(job, Decode) else 16
        if isinstance(job, Store):
            short = torch.tensor([8192])
        pages = Pages(short, page, fp8=job.fp8, at_least=1)
        if isinstance(job, Decode):
            rope = tables_of_rope(41)
            qkv = torch.randn(job.rows, 3 * HEADS * SIZE, device="cuda").bfloat16()
            scratch = Scratch.reserve(job.rows, HEADS, HEADS, SIZE, "cuda", cut=job.cut)
            attend_triton.rotate_store_attend(
                qkv, *rope, short.int().cuda(), pages.tables, pages.keys[0], pages.values[0],
                pages.scales, scratch=scratch, pdl=job.rows <= 16,
            )  # fmt: skip
        elif isinstance(job, Prompt):
            sizes = torch.tensor([[0] * job.prompts + [40], [0] * (job.prompts + 1)])
            offsets, held = sizes.int().cuda()
            tables = pages.tables.expand(job.prompts, -1).contiguous()
            q = torch.randn(40, HEADS, SIZE, device="cuda").bfloat16()
            chunks_triton.attend_chunks(
                q, pages.keys[0], pages.values[0], tables, offsets, held[1:].contiguous(),
                pages.scales, most=40, cut=job.cut,
            )  # fmt: skip
        else:
            measure_store(job, pages)
        torch.cuda.synchronize()
    except Exception as error:  # a cut may ask for more than the chip has
        return [f"{job}: {repr(error)[:150]}"]
    return []


def main() -> None:
    began = time.perf_counter()
    jobs: list[Job] = [*check_attend.checks(), *prompts(), *decodes(), *stores()]
    unlike = list({alike(job): job for job in jobs}.values())
    with multiprocessing.get_context("spawn").Pool(15) as pool:
        wrong = [line for lines in pool.imap_unordered(prepare, unlike) for line in lines]
    print("\n".join(wrong) or f"{len(check_attend.checks())} shapes equal their twins")
    print(f"{len(unlike)} kernels ready after {time.perf_counter() - began:.0f} s", flush=True)
    table: list[tuple[str, float]] = []
    found: dict[str, object] = {"device": torch.cuda.get_device_name(), "wrong": wrong}
    for measure in (measure_decodes, measure_prompts, measure_stores):
        table += measure()
        print(f"-- {time.perf_counter() - began:.0f} s", flush=True)
    found["table"] = table
    print(record("tune_attend", found, ("triton",)))


def show(name: str, results: list[tuple[float, str]], unit: str) -> list[tuple[str, float]]:
    """Prints the best first."""
    results.sort(key=lambda result: -result[0])
    print(f"{name} [{unit}]")
    for value, what in results:
        print(f"  {value:7.0f}  {what}")
    return [(f"{name} {what}", value) for value, what in results]


def tried(measured: object, *arguments: object) -> float:
    """What a measurement says, or 0 with its failure printed."""
    assert callable(measured)
    try:
        return float(measured(*arguments))
    except Exception as error:
        print(f"  failed: {arguments[0]} {repr(error)[:120]}")
        return 0.0


def measure_decodes() -> list[tuple[str, float]]:
    table: list[tuple[str, float]] = []
    jobs = list(decodes())
    for rows in CONTEXTS:
        tokens_B = lengths(rows)
        for fp8 in (False, True):
            results: list[tuple[float, str]] = []
            for page in (16, 32, 64):
                some = [job for job in jobs if job[:3] == (rows, page, fp8)]
                if some:
                    pages = Pages(tokens_B, page, fp8=fp8, at_least=BYTES)
                for job in some:
                    speed = tried(measure_decode, job, pages, tokens_B)
                    results.append((speed, f"pages of {page} {tuple(job.cut)}"))
            kind = "fp8" if fp8 else "bf16"
            name = f"decode, {rows} of {CONTEXTS[rows] or '100-2048'} tokens, {kind}"
            table += show(name, results, "GB/s")
    return table


def measure_prompts() -> list[tuple[str, float]]:
    table: list[tuple[str, float]] = []
    jobs = list(prompts())
    for count, tokens in dict.fromkeys(job[:2] for job in jobs):
        for fp8 in (False, True):
            pages = Pages(torch.full((count,), tokens), 16, fp8=fp8, at_least=2**28)
            some = [job for job in jobs if job[:3] == (count, tokens, fp8)]
            results = [(tried(measure_prompt, job, pages), str(tuple(job.cut))) for job in some]
            name = f"prompts, {count} of {tokens} tokens, {'fp8' if fp8 else 'bf16'}"
            table += show(name, results, "TFLOP/s")
        try:
            plain = measure_plain(count, tokens)
        except Exception as error:
            print(f"  failed: PyTorch's attention {repr(error)[:120]}")
            continue
        table += show(
            f"PyTorch, {count} of {tokens}", [(v, k) for k, v in plain.items()], "as said"
        )
    return table


def measure_stores() -> list[tuple[str, float]]:
    table: list[tuple[str, float]] = []
    for fp8 in (False, True):
        pages = Pages(torch.tensor([8192]), 16, fp8=fp8, at_least=1)
        jobs = [job for job in stores() if job.fp8 == fp8]
        results = [(tried(measure_store, job, pages), str(tuple(job)[1:])) for job in jobs]
        table += show(f"rope and store, {'fp8' if fp8 else 'bf16'}", results, "GB/s")
    return table


if __name__ == "__main__":
    main()
