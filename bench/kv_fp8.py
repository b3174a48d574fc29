"""WHAT DO KEYS AND VALUES IN FP8 COST? SmolLM2 in bf16 over real text, beside it with bf16 KV.

`python -m bench.kv_fp8 [FILE ...]`: the texts, by default what lies in this repository. Of every
token after the first in a window: its log-probability, and the best id. Perplexity is the
exponential of minus their mean; agreement, how often the best id is the same.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.record import ROOT, record
from xverse import LLM, Sampling
from xverse.engine.request import Logprob

WINDOW, WINDOWS = 1024, 24
SCORED = Sampling(max_tokens=0, prompt_logprobs=1, temperature=0.0)


def windows(llm: LLM, files: Sequence[Path]) -> list[str]:
    """Texts of about WINDOW tokens, evenly out of all files."""
    found = []
    for file in files:
        ids = llm.tokenizer.encode(file.read_text("utf-8")[: 8 * WINDOW * WINDOWS])
        starts = range(0, max(1, len(ids) - WINDOW), WINDOW)
        texts = [llm.tokenizer.decode(ids[start : start + WINDOW]) for start in starts]
        found += texts[: max(1, WINDOWS // len(files))]
    return found


def scores(llm: LLM, texts: Sequence[str]) -> list[Logprob]:
    return [each for text in texts for each in llm.generate(text, SCORED).prompt_logprobs]


def perplexity(tokens: Sequence[Logprob]) -> float:
    return math.exp(-sum(token.logprob for token in tokens) / len(tokens))


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    files = files or [
        ROOT / name for name in ("README.md", "README_zh.md", "README_ja.md", "LICENSE")
    ]
    plain = LLM("smollm2", dtype="bfloat16", kv_tokens=2 * WINDOW)
    texts = windows(plain, files)
    exact = scores(plain, texts)
    rounded = scores(LLM("smollm2", dtype="bfloat16", kv_tokens=2 * WINDOW, kv_dtype="fp8"), texts)
    same = sum(a.top[0].id == b.top[0].id for a, b in zip(exact, rounded, strict=True))
    apart = [abs(a.logprob - b.logprob) for a, b in zip(exact, rounded, strict=True)]
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct, bf16",
        "kv": "fp8 e4m3, a bf16 scale for each token and head, beside bf16",
        "texts": [file.name for file in files],
        "tokens": len(exact),
        "top_1_agreement": round(same / len(exact), 4),
        "perplexity_bf16_kv": round(perplexity(exact), 4),
        "perplexity_fp8_kv": round(perplexity(rounded), 4),
        "mean_difference_of_log_probabilities": round(sum(apart) / len(apart), 4),
    }
    print(figures)
    print(record("kv_fp8", figures, ("tokenizers",)))


if __name__ == "__main__":
    main()
