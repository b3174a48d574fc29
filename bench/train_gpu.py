"""HOW FAST IT TRAINS ON ONE GPU. XVERSE-7B shapes through the real loop, section by section.

`python -m bench.train_gpu --sections gradient,mfu4096` on an H200; `--small` goes through the same
lines on a CPU. Text comes from what bench.train_text wrote to --text, else it is random. Figures go
to bench/results after each section.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import train_adapters, train_gradient
from bench.record import record
from bench.train_steps import NEVER, Timed, figures, forget, timed_run, training
from bench.train_text import Text
from xverse.device import pick_device
from xverse.model.catalog import CATALOG, from_depth
from xverse.model.shape import ModelShape
from xverse.parallel.ranks import Ranks
from xverse.train import flops, predict
from xverse.train.build import fresh
from xverse.train.checkpoints import Checkpoints
from xverse.train.options import Keeping, Training

FORMULA = (
    "strict: 6 x parameters without the input embedding + 6 x layers x width x sequence (attention "
    "counted causal), over 989e12; PaLM's: all parameters, and 12 x"
)


class Bench:
    """What all sections share: the device, sizes, and the text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.ranks = Ranks(0, 1, pick_device("cpu" if args.small else "cuda"))
        self.device = self.ranks.device
        self.shape = train_gradient.small_shape() if args.small else CATALOG["xverse-7b"]

    def row(self, tokens: int) -> int:
        return tokens // 64 if self.args.small else tokens

    def text(self, name: str, shape: ModelShape) -> Text:
        file = self.args.text / f"{name}.npz"
        if file.exists() and not self.args.small:
            return Text.read(file)
        print(f"no {file}: random ids in its place", flush=True)
        lengths = [400, 1000, 700] * 40 if name == "streams" else [30, 12, 45, 20] * 90
        return Text.random(shape.vocab_size, lengths)


def gradient(bench: Bench) -> dict[str, Any]:
    return train_gradient.check(bench.ranks, bench.args.compile)


def mfu4096(bench: Bench) -> dict[str, Any]:
    args = bench.args
    return pretraining(bench, 4096, args.rows4096, args.passes4096)


def mfu8192(bench: Bench) -> dict[str, Any]:
    args = bench.args
    return pretraining(bench, 8192, args.rows8192, args.passes8192)


def fp8(bench: Bench) -> dict[str, Any]:
    """The same step as mfu4096's in 8 bits."""
    args = bench.args
    return pretraining(bench, 4096, args.rows4096, args.passes4096, fp8=True)


def pretraining(
    bench: Bench, row_tokens: int, rows: int, passes: int, **compute: Any
) -> dict[str, Any]:
    """Steps of the 7B on text whose documents fill their rows."""
    args, row = bench.args, bench.row(row_tokens)
    options = training(
        args.warm + args.steps, row, rows, passes, compile=args.compile,
        recompute=args.recompute, **compute,
    )  # fmt: skip
    decoder = fresh(bench.shape, options, bench.ranks)
    text = bench.text("streams", bench.shape).in_rows(row)
    timed = timed_run(decoder, options, text, bench.ranks, warm=args.warm)
    found = figures(timed, decoder, options, bench.device)
    return found | predicted(bench, options, found)


def curves(bench: Bench) -> dict[str, Any]:
    """Losses of a model of 0.4B in bf16 and in 8 bits, on the same rows."""
    args, row = bench.args, bench.row(4096)
    shape = bench.shape if args.small else from_depth(16, bench.shape.vocab_size, row)
    text = bench.text("streams", shape).in_rows(row)
    found: dict[str, Any] = {"parameters": shape.num_parameters}
    for name, eight in (("bf16", False), ("fp8", True)):
        options = training(args.warm + args.steps, row, 4, 1, compile=args.compile, fp8=eight)
        decoder = fresh(shape, options, bench.ranks)
        timed = timed_run(decoder, options, text, bench.ranks, warm=args.warm)
        found[name] = figures(timed, decoder, options, bench.device)
        del decoder
        forget(bench.device)
    pairs = list(zip(found["bf16"]["losses"], found["fp8"]["losses"], strict=True))
    found["largest_difference"] = round(max(abs(one - other) for one, other in pairs), 4)
    found["last_10"] = [round(sum(side) / len(side), 4) for side in zip(*pairs[-10:], strict=True)]
    return found


def full(bench: Bench) -> dict[str, Any]:
    """All weights of the 7B learn answers, packed in rows that documents share."""
    args, row = bench.args, bench.row(4096)
    steps = args.warm + args.tuning_steps
    options = training(steps, row, args.rows4096, args.passes4096, compile=args.compile)
    decoder = fresh(bench.shape, options, bench.ranks)
    text = bench.text("lessons", bench.shape).fitting(min(row, 1024))
    timed = timed_run(decoder, options, text, bench.ranks, warm=args.warm, lessons=True)
    found = figures(timed, decoder, options, bench.device)
    peak = flops.peak(bench.device)
    if peak is not None:  # attention that is within documents alone, which is what is computed
        seen = text.mean_document()
        speed = found["tokens_per_s"]
        found["mfu_strict_within_documents"] = round(
            speed * flops.strict(bench.shape, round(seen)) / peak, 4
        )
    return found | predicted(bench, options, found)


def lora(bench: Bench) -> dict[str, Any]:
    """Ours, then PEFT's, on the same rows."""
    args, row = bench.args, bench.row(2048)
    options = train_adapters.options_of(
        args.warm + args.tuning_steps, row, args.rows_lora, "none", args.compile
    )
    text = bench.text("streams", bench.shape).in_rows(row)
    given = (options, text, bench.ranks, args.warm)
    found: dict[str, Any] = {"ours": train_adapters.ours(bench.shape, "lora", *given)}
    print(f"ours: {found['ours']}", flush=True)
    found["peft"] = train_adapters.theirs(bench.shape, *given)
    ratio = found["ours"]["tokens_per_s"] / found["peft"]["tokens_per_s"]
    return found | {"ours_over_peft": round(ratio, 3)}


def memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of LoRA and QLoRA: one row of 2,048, everything in blocks computed again."""
    row = bench.row(2048)
    text = bench.text("streams", bench.shape).in_rows(row)
    found: dict[str, Any] = {}
    for method in ("lora", "qlora int4"):
        options = train_adapters.options_of(6, row, 1, "full", bench.args.compile)
        found[method] = train_adapters.ours(bench.shape, method, options, text, bench.ranks, 2)
        print(f"{method}: {found[method]}", flush=True)
    return found


def save(bench: Bench) -> dict[str, Any]:
    """What checkpoints cost a run of a model of 1B: one is begun every 60 steps."""
    args, row, every = bench.args, bench.row(4096), 60 if not bench.args.small else 4
    shape = bench.shape if args.small else from_depth(24, bench.shape.vocab_size, row)
    options = training(2 * every + every // 2, row, 4, 1, compile=args.compile)
    options = dataclasses.replace(options, keep=Keeping(save_every=every, evaluate_every=NEVER))
    decoder = fresh(shape, options, bench.ranks)
    text = bench.text("streams", shape).in_rows(row)
    kept: list[Checkpoints] = []

    def checkpoints(folder: Path) -> Checkpoints:
        kept.append(Checkpoints(folder / "checkpoints", bench.ranks, keep=1))
        return kept[0]

    timed = timed_run(decoder, options, text, bench.ranks, warm=every // 2, checkpoints=checkpoints)
    return save_figures(timed, every, shape) | {"write_s": round(kept[0].seconds, 2)}


def save_figures(timed: Timed, every: int, shape: ModelShape) -> dict[str, Any]:
    """Seconds that a save took from the steps: from where a step was told of to the next one."""
    told = [step["time"] for step in timed.steps]
    spans = [later - earlier for earlier, later in pairwise(told)]  # of step i + 1, and a save
    saving = {number for number in range(len(spans)) if (number + 1) % every == 0}
    quiet = [s for n, s in enumerate(spans) if n > timed.warm and n % every > every // 2]
    usual = statistics.median(quiet)
    slower = [
        sum(spans[n : n + every // 2]) - usual * len(spans[n : n + every // 2]) for n in saving
    ]
    return {
        "parameters": shape.num_parameters,
        "usual_step_s": round(usual, 4),
        "steps_that_save_s": [round(spans[number], 4) for number in sorted(saving)],
        "lost_s_a_save": [round(lost, 4) for lost in slower],
        "lost_share_of_500_steps": round(statistics.median(slower) / (500 * usual), 5),
    }


def offload(bench: Bench) -> dict[str, Any]:
    """The 7B with what --offload names in the host's memory, updated there, all states in fp32."""
    args, row = bench.args, bench.row(4096)
    found: dict[str, Any] = {}
    for kind in args.offload:
        options = training(
            args.warm_offload + args.steps_offload, row, args.rows4096, args.passes4096,
            master="float32", compile=args.compile, recompute=args.recompute, offload=kind,
        )  # fmt: skip
        update = dataclasses.replace(options.update, moments=args.moments_offload)
        options = dataclasses.replace(options, update=update)
        device = str(bench.device)
        ranks = Ranks.start(device, grouped=True) if kind == "parameters" else bench.ranks
        try:
            decoder = fresh(bench.shape, options, ranks)
            text = bench.text("streams", bench.shape).in_rows(row)
            timed = timed_run(decoder, options, text, ranks, warm=args.warm_offload)
            here = figures(timed, decoder, options, ranks.device)
            memory = predict.memory(bench.shape, options, dtype="bfloat16", ranks=1)
            here |= predicted(bench, options, here)
            here["predicted_host_GB"] = round(memory.host / 1e9, 2)
            here["host_peak_GB"] = round(host_peak() / 1e9, 2)
            found[kind] = here
            print(f"{kind}: {here}", flush=True)
            del decoder, timed
        except Exception:
            print(f"offload {kind} failed:\n{traceback.format_exc()}", flush=True)
        finally:
            if ranks is not bench.ranks:
                ranks.close()
        forget(bench.device)
    return found


def host_peak() -> int:
    """The most bytes of memory that this process had so far, what is pinned included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predicted(bench: Bench, options: Training, found: dict[str, Any]) -> dict[str, Any]:
    """What --dry-run says of the memory, beside what was measured."""
    memory = predict.memory(bench.shape, options, dtype="bfloat16", ranks=1)
    told: dict[str, Any] = {"predicted_GB": round(memory.total / 1e9, 3)}
    if "peak_GB" in found:
        told["predicted_over_measured"] = round(told["predicted_GB"] / found["peak_GB"], 4)
    return told


# Section -> what does it, and seconds on an H200, compilation included.
SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], int]] = {
    "gradient": (gradient, 60),
    "mfu4096": (mfu4096, 110),
    "mfu8192": (mfu8192, 115),
    "fp8": (fp8, 100),
    "curves": (curves, 80),
    "full": (full, 80),
    "lora": (lora, 100),
    "memory": (memory, 60),
    "save": (save, 75),
    "offload": (offload, 120),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    estimates = ", ".join(f"{name} {seconds} s" for name, (_, seconds) in SECTIONS.items())
    parser.add_argument("--sections", default=",".join(SECTIONS), help=estimates)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--text", type=Path, default=Path(".kern"))
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--tuning-steps", type=int, default=25, help="of full and lora")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--rows4096", type=int, default=4, help="of a pass")
    parser.add_argument("--passes4096", type=int, default=1, help="of a step")
    parser.add_argument("--rows8192", type=int, default=2)
    parser.add_argument("--passes8192", type=int, default=1)
    parser.add_argument("--rows-lora", type=int, default=4, help="of 2,048 tokens, in a pass")
    parser.add_argument(
        "--offload", nargs="+", default=["optimizer"], choices=("optimizer", "parameters")
    )
    parser.add_argument("--steps-offload", type=int, default=4, help="that are timed")
    parser.add_argument("--warm-offload", type=int, default=2)
    parser.add_argument(
        "--moments-offload", default="float32", choices=("float32", "bfloat16"),
        help="of 7B, 88 GB or 58 GB on the host",
    )  # fmt: skip
    parser.add_argument("--wheels", type=Path, default=Path(".whl"), help="where peft may be")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--compile", default="auto", choices=("auto", "yes", "no"))
    parser.add_argument("--record", default="train_h200", help="name of the JSON files")
    args = parser.parse_args()
    args.sections = args.sections.split(",")
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there are no sections {sorted(unknown)}")
    return args


def keep(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """What a section found, on the terminal and in bench/results."""
    short = {key: value for key, value in found.items() if key != "losses"}
    print(f"{name}: {json.dumps(short)}", flush=True)
    if not args.small:
        record(f"{args.record}_{name}", {"formula": FORMULA, **found}, ("triton",))


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.path += [str(wheel) for wheel in args.wheels.glob("peft-*.whl")]
    bench = Bench(args)
    for name in args.sections:
        began = time.perf_counter()
        try:
            found = SECTIONS[name][0](bench)
            keep(args, name, found | {"section_s": round(time.perf_counter() - began, 1)})
        except Exception:
            print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
        forget(bench.device)


if __name__ == "__main__":
    main()
