"""THE SERVING TABLE. XVERSE-7B's shape, random weights, one GPU: the engine under seven loads.

    a    128 in, 256 out, one request alone: new tokens a second, prompt included in the time
    b    8 and 64 requests at once, 128 in, 128 out
    c    time to the first token of prompts of 2,048 and 8,191 tokens
    d    256 requests of 100 to 1,024 tokens in and out, uniform, seed 0
    e    1,024 requests of 128 in, 128 out
    d8, e8   d and e with keys and values in fp8

Greedy, end ids ignored. Prompts are random ids, and no request may share a page with another, so
that nothing is gained by prefixes. First a small random model and this one must give the plain
decoder's answers; then every number of rows is warmed up; then it is timed.
`python -m bench.throughput_gpu --parts a,b` runs a part, and records under its own name.
"""

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Sequence

import torch

from bench.record import record
from xverse.engine.agree import Agreement, judge
from xverse.engine.engine import Engine
from xverse.engine.footprint import bytes_per_token, copy_bandwidth, footprint
from xverse.engine.measure import Measured, measure_throughput, percentile, warm
from xverse.engine.options import EngineOptions
from xverse.engine.simple import decode
from xverse.engine.workload import Range, apart, make_requests
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder
from xverse.model.fresh import random_decoder
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape

MODEL = "xverse-7b"  # whose figures under vLLM are known
DEVICE = torch.device("cuda")
PARTS = ("a", "b", "c", "d", "e", "d8", "e8")
# What we want, and what vLLM 0.24.0 does.
TARGETS: dict[str, tuple[float, float]] = {
    "a 1 x (128, 256)": (260, 216),
    "b 8 x (128, 128)": (1900, 1547),
    "b 64 x (128, 128)": (8500, 7460),
    "c 2048": (46, 46.6),
    "c 8191": (195, 197.9),
    "d 256 x (100-1024, 100-1024)": (6200, 5624),
    "e 1024 x (128, 128)": (12500, 11566),
    "d8 256 x (100-1024, 100-1024)": (8500, 6303),
    "e8 1024 x (128, 128)": (14500, 12795),
}
SMALL = ModelShape(
    model_type="xverse",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=1024,
)


def options_of(args: argparse.Namespace, *, fp8: bool) -> EngineOptions:
    """As many tokens of keys and values as the engine finds memory for, unless told."""
    return EngineOptions(
        kv_tokens=args.kv_tokens,
        kv_dtype="fp8" if fp8 else "auto",
        max_running=args.max_running,
        step_tokens=args.step_tokens,
    )


def answers_of(engine: Engine, counts: Sequence[int], *, steps: int = 16) -> list[Agreement]:
    """Greedy answers of so many requests at once, the first few of each crowd judged."""
    judged = []
    for count in counts:
        some = make_requests(count, (5, 70), (24, 24), vocabulary=engine.decoder.shape.vocab_size)
        run = measure_throughput(engine, apart(some, f"check {count}"))
        for request, answer in list(zip(some, run.answers, strict=True))[:4]:
            judged.append(judge(engine.decoder, request, answer.ids, rounding_steps=steps))
    return judged


def summary(judged: Sequence[Agreement]) -> dict[str, object]:
    """How many tokens were the plain decoder's own choice; wrong ones end the run."""
    tokens = sum(len(one.ids) for one in judged)
    ties, wrong = sum(one.ties for one in judged), sum(one.wrong for one in judged)
    assert not wrong, [str(one) for one in judged]
    return {"tokens": tokens, "near_ties": ties, "top_1_agreement": round(1 - ties / tokens, 4)}


def check_small(*, fp8: bool) -> dict[str, object]:
    """A small model: in fp32 equal ids, in bf16 the plain decoder's best token or a near tie."""
    found: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        decoder = fuse(random_decoder(SMALL, dtype=dtype, device=DEVICE, std=0.08))
        engine = Engine(decoder, options=EngineOptions(kv_tokens=16384))
        if dtype == torch.float32:
            some = make_requests(12, (5, 70), (24, 24), vocabulary=SMALL.vocab_size)
            run = measure_throughput(engine, some)
            for request, answer in zip(some, run.answers, strict=True):
                assert request.sampling is not None
                plain = decode(decoder, [request.ids], [request.sampling])
                assert answer.ids == tuple(token.id for token in plain)
            found["small model, fp32"] = "12 at once: all ids equal those of the plain decoder"
        else:
            found["small model, bf16"] = summary(answers_of(engine, (1, 8, 40)))
            if fp8:
                engine = Engine(decoder, options=EngineOptions(kv_tokens=16384, kv_dtype="fp8"))
                found["small model, fp8 KV"] = summary(answers_of(engine, (1, 8, 40), steps=32))
    return found


class Table:
    """Figures as they come: printed at once, and kept for the record."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, object]] = {}
        print(f"{'':32}{'xverse':>10}{'target':>10}{'vLLM':>10}{'of vLLM':>9}", flush=True)

    def add(self, name: str, unit: str, value: float, **more: object) -> None:
        """One figure; `unit` ms is better when smaller."""
        target, vllm = TARGETS[name]
        times = vllm / value if unit == "ms" else value / vllm
        met = value <= target if unit == "ms" else value >= target
        print(
            f"{name:32}{value:10,.1f}{target:10,.0f}{vllm:10,.1f}{times:8.2f}x"
            f"  {unit}{'' if met else '  BELOW TARGET'}",
            flush=True,
        )
        figure = {unit: round(value, 2), "target": target, "vllm": vllm, "target_met": met}
        self.figures[name] = figure | {"times_vllm": round(times, 3)} | more


def rounds(
    engine: Engine, name: str, count: int, prompt: Range, new: Range, repeat: int
) -> list[Measured]:
    """The same requests `repeat` times; no round finds pages of another."""
    some = make_requests(count, prompt, new, vocabulary=engine.decoder.shape.vocab_size)
    return [measure_throughput(engine, apart(some, f"{name} {n}")) for n in range(repeat)]


def load(
    table: Table, engine: Engine, part: str, count: int, prompt: Range, new: Range, repeat: int
) -> None:
    """A figure of new tokens a second: the median of the rounds."""
    lengths = [str(a) if a == b else f"{a}-{b}" for a, b in (prompt, new)]
    name = f"{part} {count} x ({', '.join(lengths)})"
    runs = rounds(engine, name, count, prompt, new, repeat)
    tpots, ttfts = ([x for run in runs for x in getattr(run, k)] for k in ("tpots_s", "ttfts_s"))
    table.add(
        name,
        "tok/s",
        statistics.median(run.output_tokens_per_s for run in runs),
        tok_per_s_all=[round(run.output_tokens_per_s, 1) for run in runs],
        total_tok_per_s=round(statistics.median(run.total_tokens_per_s for run in runs), 1),
        tokens_in_and_out=[runs[0].prompt_tokens, runs[0].output_tokens],
        tpot_ms_median_p95=[round(1e3 * percentile(tpots, share), 3) for share in (0.5, 0.95)],
        ttft_ms_median_p95=[round(1e3 * percentile(ttfts, share), 1) for share in (0.5, 0.95)],
        preempted=sum(run.preempted or 0 for run in runs),
        reused_tokens=sum(run.reused_tokens or 0 for run in runs),
    )


def first_token(table: Table, engine: Engine, tokens: int) -> None:
    """Median of five, after one that is not counted."""
    runs = rounds(engine, f"c {tokens}", 1, (tokens, tokens), (1, 1), 6)[1:]
    times = [1e3 * run.ttfts_s[0] for run in runs]
    table.add(f"c {tokens}", "ms", statistics.median(times), ms_all=[round(ms, 2) for ms in times])


def measure(table: Table, engine: Engine, parts: Sequence[str], repeat: int) -> None:
    """Those of the parts that this engine is for; long ones once."""
    wide = (100, 1024)
    if "a" in parts:
        load(table, engine, "a", 1, (128, 128), (256, 256), repeat)
    if "b" in parts:
        for count in (8, 64):
            load(table, engine, "b", count, (128, 128), (128, 128), repeat)
    if "c" in parts:
        for tokens in (2048, 8191):
            first_token(table, engine, tokens)
    for part in parts:
        if part in ("d", "d8"):
            load(table, engine, part, 256, wide, wide, 1)
        if part in ("e", "e8"):
            load(table, engine, part, 1024, (128, 128), (128, 128), 1)


def session(
    args: argparse.Namespace, decoder: Decoder, table: Table, parts: Sequence[str], *, fp8: bool
) -> dict[str, object]:
    """One engine: opened, judged, warmed up, timed, and its memory given back."""
    torch.cuda.reset_peak_memory_stats()
    options = options_of(args, fp8=fp8)
    engine = Engine(decoder, options=options)
    judged = summary(answers_of(engine, (1, 64), steps=32 if fp8 else 16))
    warm(engine)
    rounds(engine, "warm", 1, (2048, 2048), (2, 2), 1)
    measure(table, engine, parts, args.repeat)
    facts: dict[str, object] = {
        "correctness": judged,
        "options": dataclasses.asdict(options),
        "memory": dataclasses.asdict(footprint(engine)),
    }
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return facts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The engine under load on one GPU.")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: %(default)s")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of a and b")
    parser.add_argument("--max-running", type=int, default=1024)
    parser.add_argument("--step-tokens", type=int, default=None)
    parser.add_argument("--kv-tokens", type=int, default=None, help="all there is memory for")
    parser.add_argument("--record", default="throughput_h200", help="name of the JSON file")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"there are no parts {sorted(unknown)}")
    return args


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    in_fp8 = [part for part in args.parts if part.endswith("8")]
    in_bf16 = [part for part in args.parts if not part.endswith("8")]
    checked = check_small(fp8=bool(in_fp8))
    print(checked, flush=True)
    bandwidth = copy_bandwidth(DEVICE)
    torch.cuda.empty_cache()
    shape = CATALOG[MODEL]
    decoder = fuse(random_decoder(shape, dtype=torch.bfloat16, device=DEVICE))
    torch.cuda.empty_cache()
    table = Table()
    figures: dict[str, object] = {
        "model": f"{MODEL} shape, random weights, bf16",
        "load": "greedy, end ids ignored, random prompts, no page shared between requests",
        "checked_first": checked,
        "copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 3),
        "floor_tokens_per_s_batch_1": round(bandwidth / bytes_per_token(decoder), 1),
        "vllm": "0.24.0, bf16, same shapes and loads on the same kind of card, measured apart",
        "figures": table.figures,
    }
    if in_bf16:
        figures["bf16 KV"] = session(args, decoder, table, in_bf16, fp8=False)
    if in_fp8:
        figures["fp8 KV"] = session(args, decoder, table, in_fp8, fp8=True)
    print(figures)
    name = args.record
    if set(args.parts) != set(PARTS):
        name += "_" + "_".join(args.parts)
    print(record(name, figures, ("triton",)))


if __name__ == "__main__":
    main()
