"""SECONDS PER TOKEN ON A CPU. SmolLM2 decoding here, in transformers and in llama.cpp, in turn.

Ours and transformers compute in bf16 from the same weights, those of the GGUF dequantized, and
must agree on the first tokens before anything is timed. llama.cpp reads the file's Q4_1 blocks
themselves, about a third of the bytes. Rounds alternate, so that a busy neighbour slows all; the
figure is the median, and what counts is the ratio.
"""

import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.record import record
from xverse import LLM, Sampling
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.checkpoint.resolve import resolve

TOKENS = 128
ROUNDS = 7
PROMPT = "The history of the printing press begins in"


def ours(llm: LLM) -> Callable[[], list[int]]:
    """Decoding by `LLM.generate`."""
    greedy = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return lambda: list(llm.generate(PROMPT, greedy).tokens)


def transformers_generate(llm: LLM, file: Path, ids: list[int]) -> Callable[[], list[int]]:
    """`generate` of transformers' Llama with the weights that ours has."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = llm.model.checkpoint.shape.to_config()
    model: Any = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16().eval()
    weights = GgufWeights(GgufFile.open(file))
    state = {name: weights.read(name, torch.bfloat16) for name in weights.infos()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"]), missing  # tied
    prompt = torch.tensor([ids])
    greedy = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)

    def generate() -> list[int]:
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, generation_config=greedy)
        new: list[int] = out[0, len(ids) :].tolist()
        return new

    return generate


def llama_cpp(file: Path, ids: list[int]) -> Callable[[], list[int]]:
    """llama.cpp reading the file's own Q4_1 blocks."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    llama = Llama(str(file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    return lambda: list(islice(llama.generate(ids, temp=0.0), TOKENS))


def main() -> None:
    file = resolve("smollm2")
    llm = LLM(file, dtype="bfloat16")
    ids = llm.tokenizer.encode(PROMPT)
    runs = {
        "xverse bf16": ours(llm),
        "transformers bf16": transformers_generate(llm, file, ids),
    }
    try:
        runs["llama.cpp Q4_1"] = llama_cpp(file, ids)
    except ImportError:
        print("llama-cpp-python is not installed; `make bench` installs it")
    first = {name: run() for name, run in runs.items()}  # warms up, too
    assert first["xverse bf16"][:8] == first["transformers bf16"][:8], first
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            count = len(run())
            assert count == TOKENS, (name, count)
            speeds[name].append(count / (time.perf_counter() - start))
    medians = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    ratios = {name: round(medians["xverse bf16"] / value, 3) for name, value in medians.items()}
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct",
        "prompt_tokens": len(ids),
        "new_tokens": TOKENS,
        "tokens_per_s_median": medians,
        "tokens_per_s_all": {name: [round(v, 2) for v in vs] for name, vs in speeds.items()},
        "xverse_is_times_as_fast_as": ratios,
    }
    for name, value in medians.items():
        print(f"{name:<20} {value:8.1f} tokens/s   xverse is {ratios[name]}x")
    print(record("decode_cpu", figures, ("transformers", "llama-cpp-python", "tokenizers")))


if __name__ == "__main__":
    main()
