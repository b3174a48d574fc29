"""SECONDS PER TOKEN ON A CPU. SmolLM2 decoding here, in transformers and in llama.cpp, in turn.

The same GGUF everywhere. Ours and transformers compute in bf16 from equal weights and must give
the same first tokens; llama.cpp reads the Q4_1 blocks themselves, a third of the bytes, and bf16
as well where its own conversion of the file can be made. Rounds alternate, so that a busy
neighbour slows all; the figure is the median, and what counts is the ratio.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.record import record
from xverse import LLM, Sampling
from xverse.checkpoint.resolve import resolve

TOKENS = 128
ROUNDS = 7
PROMPT = "The history of the printing press begins in"


def ours(file: Path) -> tuple[list[int], Callable[[], int]]:
    """The prompt's ids, and a function that decodes and returns how many tokens came."""
    llm = LLM(file, dtype="bfloat16")
    greedy = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return llm.tokenizer.encode(PROMPT), lambda: len(llm.generate(PROMPT, greedy).tokens)


def transformers_generate(file: Path, ids: list[int]) -> Callable[[], int]:
    """`generate` of transformers on the same weights in bf16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.bfloat16
    ).eval()
    prompt = torch.tensor([ids])

    def generate() -> int:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        return int(out.shape[1]) - len(ids)

    return generate


def llama_cpp(file: Path, ids: list[int]) -> Callable[[], int]:
    """llama.cpp reading the file's own Q4_1 blocks."""
    from llama_cpp import Llama

    llama = Llama(
        str(file), n_ctx=512, n_threads=torch.get_num_threads(), verbose=False, logits_all=False
    )

    def generate() -> int:
        llama.reset()
        count = 0
        for _ in llama.generate(ids, temp=0.0):
            count += 1
            if count == TOKENS:
                return count
        return count

    return generate


def main() -> None:
    file = resolve("smollm2")
    ids, mine = ours(file)
    runs = {"xverse bf16": mine, "transformers bf16": transformers_generate(file, ids)}
    try:
        runs["llama.cpp Q4_1"] = llama_cpp(file, ids)
    except ImportError:
        print("llama-cpp-python is not installed; `make bench` installs it")
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # warm
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            count = run()
            speeds[name].append(count / (time.perf_counter() - start))
    medians = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct",
        "prompt_tokens": len(ids),
        "new_tokens": TOKENS,
        "tokens_per_s_median": medians,
        "tokens_per_s_all": {name: [round(v, 2) for v in vs] for name, vs in speeds.items()},
        "ratio_to_xverse": {
            name: round(medians["xverse bf16"] / value, 3) for name, value in medians.items()
        },
    }
    for name, value in medians.items():
        print(f"{name:<20} {value:8.1f} tokens/s   xverse is {figures['ratio_to_xverse'][name]}x")  # type: ignore[index]
    print(record("decode_cpu", figures, ("transformers", "llama-cpp-python", "tokenizers")))


if __name__ == "__main__":
    main()
