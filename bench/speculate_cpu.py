"""TOKENS PER SECOND OF A COPY. SmolLM2 on this CPU, with guesses from the text and without.

Two tasks that repeat their prompt, and one that does not, in bf16 and in fp32. Both ways must give
the same answer, to its last log-probability in bf16; rounds alternate. Decoding alone is timed,
from the first piece of text to the last, by the processor's time: a busy neighbour is not counted.
"""

import statistics
import time
from typing import Literal

from bench.record import record
from xverse import LLM, Sampling
from xverse.checkpoint.resolve import resolve
from xverse.engine.engine import Engine

TOKENS = 96
ROUNDS = 2
GUESSES = 8
LETTER = (
    "The committee met on Tuesday in the old town hall. It heard the report of the harbour "
    "master, Mrs. Adelaide Winterbottom, on the state of the northern pier. The committee resolved "
    "to repair the northern pier before the winter, and asked the harbour master to obtain offers."
)
PROMPTS = {
    "copy a text": f"The letter:\n{LETTER}\n\nThe letter once more, word by word:\n",
    "continue a list": "item 1, item 2, item 3, item 4, item 5, item 6, item 7,",
    "free": "Once upon a time, in a village by the sea, there lived a fisherman who",
}
GREEDY = Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)


def main() -> None:
    figures = {"model": "SmolLM2-135M-Instruct", "guesses": GUESSES, "new_tokens": TOKENS}
    print(record("speculate_cpu", figures | {t: tasks(t) for t in ("bfloat16", "float32")}, ()))


def tasks(dtype: Literal["bfloat16", "float32"]) -> dict[str, object]:
    """Speeds and their ratio for each prompt."""
    plain = LLM(resolve("smollm2"), dtype=dtype)
    guessing = LLM(resolve("smollm2"), dtype=dtype, speculate=GUESSES)
    found: dict[str, object] = {}
    for name, prompt in PROMPTS.items():
        answer, expected = guessing.generate(prompt, GREEDY), plain.generate(prompt, GREEDY)
        assert answer.tokens == expected.tokens, name
        assert dtype == "float32" or answer == expected, name
        assert isinstance(guessing.engine, Engine)
        counts = guessing.engine.speculation
        proposed, accepted = counts.proposed, counts.accepted
        speeds: dict[str, list[float]] = {"plain": [], "guessing": []}
        for _ in range(ROUNDS):
            speeds["plain"].append(speed(plain, prompt))
            speeds["guessing"].append(speed(guessing, prompt))
        ratios = [new / old for old, new in zip(*speeds.values(), strict=True)]
        found[name] = {
            "prompt_tokens": answer.prompt_tokens,
            "tokens_per_cpu_s_all": {w: [round(v, 2) for v in s] for w, s in speeds.items()},
            "tokens_per_cpu_s_median": {
                w: round(statistics.median(s), 2) for w, s in speeds.items()
            },
            "ratio_median": round(statistics.median(ratios), 2),
            "guessed_a_run": (counts.proposed - proposed) // ROUNDS,
            "right_a_run": (counts.accepted - accepted) // ROUNDS,
        }
        print(dtype, name, found[name], flush=True)
    return found


def speed(llm: LLM, prompt: str) -> float:
    """Tokens a second of processor time, after the first piece."""
    pieces = llm.stream(prompt, GREEDY)
    first = len(next(iter(pieces)).tokens)
    start = time.process_time()
    rest = sum(len(piece.tokens) for piece in pieces)
    assert first + rest == TOKENS
    return rest / (time.process_time() - start)


if __name__ == "__main__":
    main()
