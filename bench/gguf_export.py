"""DOES LLAMA.CPP READ OUR GGUF AS WE DO? Token ids of real text, greedy text, and packing errors.

    python -m bench.gguf_export TOKENIZER.json TEXT.jsonl ... [--only MODEL]

SmolLM2 is the embedded model; XVERSE and XVERSE-MoE are small random models of these shapes with
the tokenizer that is given. Lines are taken in equal parts from the files, whose lines are JSON
with a "text".

llama.cpp rounds what goes into a product to f16, and we compute in fp32. So the texts are equal as
long as the weights do not blow roundings up: random ones of std 0.3 part after 16 to 24 tokens.
"""

import argparse
import ctypes
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import torch

from bench.record import record
from xverse import LLM, Sampling
from xverse.checkpoint.convert import save_weights
from xverse.checkpoint.gguf_blocks import KINDS
from xverse.checkpoint.gguf_export import export_gguf
from xverse.checkpoint.gguf_pack import pack
from xverse.checkpoint.load import open_tokenizer
from xverse.checkpoint.resolve import resolve
from xverse.checkpoint.save import published_tensors
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape

LINES = 10_000
NEW_TOKENS = 64
PROMPTS = ["The capital of France is", "从前有一座山，", "def fibonacci(n):\n", "Once upon a time"]
SHAPE: dict[str, object] = {
    "model_type": "xverse", "architectures": ["XverseForCausalLM"], "vocab_size": 100534,
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 8192, "torch_dtype": "float32",
    "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1, "rope_theta": 500000.0,
}  # fmt: skip
MIXTURE: dict[str, object] = SHAPE | {
    "intermediate_size": 160, "num_experts": 16, "moe_top_k": 4, "num_shared_experts": 2,
}  # fmt: skip


def random_xverse(folder: Path, tokenizer: Path, config: dict[str, object]) -> Path:
    """A small model of this config, with three times the spread that training begins with."""
    folder.mkdir()
    decoder = initialize(Decoder(ModelShape.from_config(config)), std=0.06)
    save_weights(published_tensors(decoder), folder)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


def lines_of(files: list[Path]) -> dict[str, list[str]]:
    """LINES lines that are not empty, the same number of each file."""
    part = -(-LINES // len(files))
    return {file.name: list(_take(file, part)) for file in files}


def _take(file: Path, count: int) -> Iterator[str]:
    for entry in file.open(encoding="utf-8"):
        for line in json.loads(entry)["text"].split("\n"):
            if line.strip() and count:
                count -= 1
                yield line


def compare_ids(model: Path, exported: Path, texts: dict[str, list[str]]) -> dict[str, object]:
    """How many lines have other ids in llama.cpp, by file."""
    ours = open_tokenizer(model)
    theirs: Any = llama_cpp.Llama(str(exported), vocab_only=True, verbose=False)
    differing = {
        name: sum(
            ours.encode(line, add_special=False)
            != theirs.tokenize(line.encode(), add_bos=False, special=False)
            for line in lines
        )
        for name, lines in texts.items()
    }
    return {"lines": {name: len(lines) for name, lines in texts.items()}, "differing": differing}


def compare_greedy(exported: Path) -> list[dict[str, object]]:
    """Greedy continuations of the same ids by both from one F16 file; we compute in fp32."""
    llm = LLM(exported, dtype="float32", device="cpu")
    theirs: Any = llama_cpp.Llama(str(exported), n_ctx=512, verbose=False)
    rows: list[dict[str, object]] = []
    for prompt in PROMPTS:
        ids = llm.tokenizer.encode(prompt)
        sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, repetition_penalty=1.0)
        mine = list(llm.generate([prompt], sampling)[0].tokens)
        got: list[int] = []
        for token in theirs.generate(ids, temp=0, repeat_penalty=1.0):
            got.append(token)
            if len(got) == len(mine):
                break
        pairs = enumerate(zip(mine, got, strict=True))
        same = next((i for i, (ours, other) in pairs if ours != other), len(got))
        facts = {"tokens": len(got), "distinct": len(set(got)), "equal": mine == got}
        rows.append({"prompt": prompt, **facts, "until": same})
    return rows


def packing_errors() -> dict[str, dict[str, float]]:
    """Relative errors (root of the mean square) of normal weights, packed by us and by ggml."""
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base*.so*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    quantize.argtypes.append(ctypes.c_void_p)
    weights = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    rows = {}
    for number, kind in KINDS.items():
        if kind.name not in ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"):
            continue
        blocks = weights.view(-1, kind.elements)
        theirs = torch.empty(len(blocks), kind.nbytes, dtype=torch.uint8)
        quantize(number, weights.data_ptr(), theirs.data_ptr(), 0, *weights.shape, None)
        rows[kind.name] = {
            name: float((kind.unpack(packed) - blocks).square().mean().sqrt())
            for name, packed in (("ours", pack(kind.name, blocks)), ("ggml", theirs))
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--only", choices=("SmolLM2-135M-Instruct", "XVERSE", "XVERSE-MoE"))
    given = parser.parse_args()
    texts = lines_of(given.texts)
    figures: dict[str, object] = {} if given.only else {"packing": packing_errors()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {
            "SmolLM2-135M-Instruct": lambda: resolve("smollm2"),
            "XVERSE": lambda: random_xverse(folder / "dense", given.tokenizer, SHAPE),
            "XVERSE-MoE": lambda: random_xverse(folder / "mixture", given.tokenizer, MIXTURE),
        }
        for name in [given.only] if given.only else models:
            model, exported = models[name](), folder / f"{name}.gguf"
            facts = export_gguf(model, exported, "f16").facts()
            figures[name] = {
                "export": {key: facts[key] for key in ("bytes", "tensors", "tokenizer")},
                "ids": compare_ids(model, exported, texts),
                "greedy": compare_greedy(exported),
            }
            print(name, json.dumps(figures[name], ensure_ascii=False), flush=True)
    file = "gguf_export" if given.only is None else f"gguf_export_{given.only.lower()}"
    print(record(file, figures, ("llama-cpp-python", "tokenizers")))


if __name__ == "__main__":
    main()
