"""SECONDS PER TOKEN OF INTEGERS ON A CPU. Quantized models here and in llama.cpp, in turn.

Two shapes with random weights, which cost what trained ones cost: SmolLM2-135M and a Llama of
1.1B (TinyLlama's). Ours: the scheme in groups, the head in int8. llama.cpp: a GGUF of the same
shape written here, Q4_0 with a head of Q8_0, or all Q8_0. Rounds alternate, so that a busy
neighbour slows both; the figure is the median, and what counts is the ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch

from bench.record import record
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Sampling
from xverse.kernels import native
from xverse.model.decoder import Decoder
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.quant.prepare import prepare
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme

SHAPES: dict[str, dict[str, object]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
BLOCKS = {"Q4_0": (18, 32), "Q8_0": (34, 32)}  # bytes, weights
PROMPT, NEW = 512, 64
Runs = dict[str, Callable[[list[int], int], float]]
Times = dict[str, dict[str, list[float]]]


class Ours:
    """The engine over a model of that shape."""

    def __init__(self, shape: dict[str, object], bits: int) -> None:
        config = {
            "model_type": "llama",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            **shape,
        }
        self.shape = ModelShape.from_config(config)
        with torch.device("meta"):
            decoder = Decoder(self.shape).to(torch.bfloat16)
        decoder = decoder.to_empty(device="cpu").eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in decoder.named_parameters():
            parameter.data.normal_(0.0, 0.02, generator=generator)
            if name.endswith("norm.weight"):
                parameter.data.fill_(1.0)
        recipe = Recipe(Scheme(bits, 128), head=Scheme(8), embedding=Scheme(8, 128))
        prepare(fuse(quantize(decoder, recipe)))
        self.engine = Engine(decoder, options=EngineOptions(kv_tokens=1024, share_prefixes=False))

    def run(self, prompt: list[int], tokens: int) -> float:
        """Seconds for that many new ones."""
        greedy = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True).over({})
        self.engine.add(Request(tuple(prompt), greedy))
        start = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return time.perf_counter() - start


class Theirs:
    """llama.cpp over a GGUF of that shape."""

    def __init__(self, shape: dict[str, object], kind: str, folder: Path) -> None:
        from llama_cpp import Llama

        file = folder / f"{kind}.gguf"
        write_gguf(file, shape, kind)
        threads = torch.get_num_threads()
        self.llama = Llama(
            str(file), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        file.unlink()

    def run(self, prompt: list[int], tokens: int) -> float:
        """Seconds for that many new ones."""
        self.llama.reset()
        start = time.perf_counter()
        assert len(list(islice(self.llama.generate(prompt, temp=0.0), tokens))) == tokens
        return time.perf_counter() - start


def write_gguf(file: Path, shape: dict[str, Any], kind: str) -> None:
    """A Llama with random blocks and without a vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter

    random = numpy.random.default_rng(0)
    writer = GGUFWriter(str(file), "llama")
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_rope_dimension_count(hidden // heads)

    def add(name: str, rows: int, columns: int, kind: str = kind) -> None:
        size, weights = BLOCKS[kind]
        blocks = random.integers(0, 256, (rows, columns // weights, size), dtype=numpy.uint8)
        blocks[..., :2] = numpy.array([0.003], numpy.float16).view(numpy.uint8)  # the scale
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType[kind])

    add("token_embd.weight", shape["vocab_size"], hidden, "Q8_0")
    if not shape["tie_word_embeddings"]:
        add("output.weight", shape["vocab_size"], hidden, "Q8_0")
    writer.add_tensor("output_norm.weight", numpy.ones(hidden, numpy.float32))
    narrow = hidden // heads * kv_heads
    for layer in range(shape["num_hidden_layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", numpy.ones(hidden, numpy.float32))
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", narrow, hidden),
            ("attn_v", narrow, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{layer}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(runs: Runs, rounds: int) -> dict[str, object]:
    """Tokens a second of prompts and of decoding, by who computes; and how ours stands."""
    generator = torch.Generator().manual_seed(1)
    speeds: Times = {name: {"prefill": [], "decode": []} for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            prompt = torch.randint(100, 30000, (PROMPT,), generator=generator).tolist()
            first = run(prompt, 1)
            short = run(prompt[:8], 1)
            long = run(prompt[8:16], NEW + 1)
            if turn:  # the first one warms up
                speeds[name]["prefill"].append(PROMPT / first)
                speeds[name]["decode"].append(NEW / (long - short))
    found: dict[str, object] = {
        name: {what: [round(v, 1) for v in values] for what, values in each.items()}
        for name, each in speeds.items()
    }
    middle = {n: {w: statistics.median(v) for w, v in e.items()} for n, e in speeds.items()}
    ours, *others = middle
    found["tokens_per_s_median"] = {
        name: {what: round(v, 1) for what, v in each.items()} for name, each in middle.items()
    }
    found["xverse_is_times_as_fast"] = {
        what: round(middle[ours][what] / middle[other][what], 2)
        for other in others
        for what in ("decode", "prefill")
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    options = parser.parse_args()
    figures: dict[str, object] = {
        "compiled": native.why_not() or native.variant(),
        "threads": torch.get_num_threads(),
        "load_before": [round(load, 1) for load in os.getloadavg()],  # of others on this machine
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
    }
    for name in options.shapes:
        for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
            runs: Runs = {f"xverse int{bits}": Ours(SHAPES[name], bits).run}
            try:
                with tempfile.TemporaryDirectory() as folder:
                    runs[f"llama.cpp {kind}"] = Theirs(SHAPES[name], kind, Path(folder)).run
            except ImportError:
                print("llama-cpp-python is not installed; `make bench` installs it")
            found = measure(runs, options.rounds)
            figures[f"{name}, {bits} bits"] = found
            print(name, bits, found["tokens_per_s_median"], found["xverse_is_times_as_fast"])
    print(record("quant_cpu", figures, ("llama-cpp-python",)))


if __name__ == "__main__":
    main()
