"""HOW FAST IT TRAINS ON ONE GPU. XVERSE-7B shapes through the real loop, section by section.

`python -m bench.train_gpu --sections gradient,mfu4096` on an H200; `--small` goes through the same
lines on a CPU. Text comes from what bench.train_text wrote to --text, else it is random. Figures go
to bench/results after each section, and to $OUT where that is set.
"""

import argparse
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from bench import train_gradient
from bench.record import record
from bench.train_steps import figures, forget, timed_run, training
from bench.train_text import Text
from xverse.device import pick_device
from xverse.model.catalog import CATALOG
from xverse.model.shape import ModelShape
from xverse.parallel.ranks import Ranks
from xverse.train import predict
from xverse.train.build import fresh
from xverse.train.options import Training

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
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    estimates = ", ".join(f"{name} {seconds} s" for name, (_, seconds) in SECTIONS.items())
    parser.add_argument("--sections", default=",".join(SECTIONS), help=estimates)
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--text", type=Path, default=Path(".kern"))
    parser.add_argument("--steps", type=int, default=50, help="that are timed")
    parser.add_argument("--warm", type=int, default=5)
    parser.add_argument("--rows4096", type=int, default=4, help="of a pass")
    parser.add_argument("--passes4096", type=int, default=1, help="of a step")
    parser.add_argument("--rows8192", type=int, default=2)
    parser.add_argument("--passes8192", type=int, default=1)
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--compile", default="auto", choices=("auto", "yes", "no"))
    parser.add_argument("--record", default="train_h200", help="name of the JSON files")
    args = parser.parse_args()
    args.sections = args.sections.split(",")
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there are no sections {sorted(unknown)}")
    return args


def keep(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """What a section found, on the terminal, in bench/results and in $OUT."""
    short = {key: value for key, value in found.items() if key != "losses"}
    print(f"{name}: {json.dumps(short)}", flush=True)
    if args.small:
        return
    file = record(f"{args.record}_{name}", {"formula": FORMULA, **found}, ("triton",))
    if out := os.environ.get("OUT"):
        shutil.copy(file, out)


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
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
