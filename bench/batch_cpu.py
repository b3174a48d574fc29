"""TOKENS PER SECOND OF MANY. SmolLM2 on this CPU: 1, 4 and 16 requests at once, in turn.

First the 16 answers must be those that the plain decoder gives in fp32; then bf16 is timed, as
users run it. Rounds alternate, so that a busy neighbour slows all; the figure is the median, and
what counts is the ratio.
"""

import statistics
import time

from bench.record import record
from xverse import LLM, Sampling
from xverse.checkpoint.resolve import resolve
from xverse.engine.simple import decode

TOKENS = 128
ROUNDS = 5
TOPICS = (
    "printing press",
    "steam engine",
    "violin",
    "potato",
    "umbrella",
    "postage stamp",
    "telescope",
    "bicycle",
    "piano",
    "compass",
    "alphabet",
    "calendar",
    "tea trade",
    "railway",
    "microscope",
    "lighthouse",
)
PROMPTS = [f"The history of the {topic} begins in" for topic in TOPICS]


def check() -> None:
    """Greedy ids of all at once equal those of each alone through the plain decoder."""
    llm = LLM(resolve("smollm2"), dtype="float32")
    options = Sampling(temperature=0.0, max_tokens=16, ignore_eos=True)
    for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, options), strict=True):
        ids = llm.tokenizer.encode(prompt)
        alone = [t.id for t in decode(llm.decoder, [ids], [options.over({})])]
        assert list(answer.tokens) == alone, prompt


def main() -> None:
    check()
    llm = LLM(resolve("smollm2"), dtype="bfloat16")
    greedy = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    speeds: dict[int, list[float]] = {1: [], 4: [], 16: []}
    plain: list[float] = []
    llm.generate(PROMPTS, greedy)  # warm
    for _ in range(ROUNDS):
        for count, found in speeds.items():
            start = time.perf_counter()
            answers = llm.generate(PROMPTS[:count], greedy)
            tokens = sum(len(answer.tokens) for answer in answers)
            found.append(tokens / (time.perf_counter() - start))
        ids = llm.tokenizer.encode(PROMPTS[0])
        start = time.perf_counter()
        tokens = sum(1 for _ in decode(llm.decoder, [ids], [greedy.over({})]))
        plain.append(tokens / (time.perf_counter() - start))
    medians = {count: statistics.median(found) for count, found in speeds.items()}
    figures: dict[str, object] = {
        "model": "SmolLM2-135M-Instruct, bf16",
        "prompt_tokens": [len(llm.tokenizer.encode(prompt)) for prompt in PROMPTS],
        "new_tokens": TOKENS,
        "tokens_per_s_median": {f"{n} at once": round(v, 1) for n, v in medians.items()},
        "tokens_per_s_plain_decoder_alone": round(statistics.median(plain), 1),
        "tokens_per_s_all": {
            f"{n} at once": [round(v, 1) for v in found] for n, found in speeds.items()
        },
        "ratio_to_one": {f"{n} at once": round(v / medians[1], 2) for n, v in medians.items()},
    }
    print(figures)
    print(record("batch_cpu", figures, ()))


if __name__ == "__main__":
    main()
