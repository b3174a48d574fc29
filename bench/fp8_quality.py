"""WHAT 8 BITS ON BOTH SIDES COST. fp8 weights alone, and with rows of x in fp8 as on a GPU.

    python -m bench.fp8_quality MODEL --evaluate FILE .. [--tokens 12288]

A GPU multiplies prompts of `LEAST_ROWS` tokens and more in 8 bits on both sides where weights are
fp8 (`kernels/multiply_rounded.py`). Here the plain twins do the same on a CPU, in fp32 but for the
rounding, and the model is compared with its source token by token, in rows of --length tokens.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench.quant_quality import passed, rows_of, stored
from bench.record import record
from xverse.checkpoint.load import load
from xverse.kernels import dispatch_quantized, reference_steps
from xverse.kernels.choice import Choice
from xverse.kernels.multiply_rounded import LEAST_ROWS
from xverse.kernels.reference_few_bits import FewBits
from xverse.quant.compare import compare
from xverse.quant.quantize import quantize


def in_8_bits(x_TD: Tensor, weight: FewBits) -> Tensor:
    """A product with both sides in 8 bits, where rows are many."""
    if len(x_TD) < LEAST_ROWS:
        return reference_steps.multiply_steps(x_TD, weight)
    return reference_steps.multiply_rounded(reference_steps.round_rows(x_TD), weight)


@contextmanager
def computed_by(call: Callable[[Tensor, FewBits], Tensor]) -> Iterator[None]:
    """While it lasts, quantized layers compute so."""
    choice = Choice("products", "the twins", "their quality is measured", call)
    with mock.patch.object(dispatch_quantized, "multiply_steps", return_value=choice):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    source = load(args.model, dtype="float32", device="cpu")
    before = passed(source, rows_of(source, args.evaluate, args.tokens, args.length))
    small = load(args.model, dtype="float32", device="cpu")
    quantize(small.decoder, "fp8")
    rows: dict[str, object] = {}
    for name, call in (
        ("fp8 weights", reference_steps.multiply_steps),
        ("fp8 weights, rows of x in fp8", in_8_bits),
    ):
        with computed_by(call):
            quality = compare(before, passed(small, [list(row) for row in before.samples]))
        loss = {"perplexity_loss_percent": round(100 * quality.loss, 4)}
        rows[name] = loss | {key: round(value, 6) for key, value in asdict(quality).items()}
        print(name, rows[name], flush=True)
    figures: dict[str, object] = {
        "model": source.checkpoint.title,
        "stored": stored(source),
        "evaluated_on": {
            "files": [Path(file).name for file in args.evaluate],
            "tokens": before.tokens,
        },
        "rows": rows,
    }
    print(record(f"fp8_quality_{source.checkpoint.title.lower()}", figures, ("safetensors",)))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
