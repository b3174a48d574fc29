"""A model whose log-probabilities are a hash of what it is shown, and data in the real layouts."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from xverse.evals.door import Ask, Foretold, Prompt, Reading


class FakeDoor:
    """Fixed log-probabilities; `dies_after` batches it is killed."""

    batch = 64
    context: int | None = None
    reads: Literal["scores", "letters"] = "scores"

    def __init__(self, name: str = "fake", dies_after: int | None = None) -> None:
        self.facts = {"model": name, "weights": f"hash of {name}"}
        self.left = dies_after
        self.asked: list[Ask] = []
        self.shown: list[str] = []

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        return [len(prompt.text) for prompt in prompts]

    def without_middle(self, text: str, tokens: int) -> str:
        return text if len(text) <= tokens else text[: tokens // 2] + text[-(tokens // 2) :]

    def read(self, asks: Sequence[Ask], namespace: str) -> list[Reading]:
        self._tick()
        self.asked += asks
        return [
            Reading(
                tuple(self.logit(ask.prompt.text, option) for option in ask.options),
                (False,) * len(ask.options) if ask.greedy else (),
            )
            for ask in asks
        ]

    def write(
        self, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str], namespace: str
    ) -> list[str]:
        self._tick()
        self.shown += [prompt.text for prompt in prompts]
        return [f" the answer is {int(-1e3 * self.logit(p.text, ''))}" for p in prompts]

    def foretell(self, texts: Sequence[str], namespace: str) -> list[Foretold]:
        self._tick()
        return [Foretold(-2.0 * len(text), len(text)) for text in texts]

    def logit(self, prompt: str, option: str) -> float:
        name = self.facts["model"]
        seen = hashlib.sha256(f"{name}|{prompt}|{option}".encode()).digest()
        return -int.from_bytes(seen[:4], "big") / 2**32

    def _tick(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1


def own_questions(folder: Path, count: int = 12) -> Path:
    """A file of one's own questions."""
    file = folder / "own.jsonl"
    rows = [
        {"question": f"What is {n} + {n}?", "choices": [str(n), str(2 * n), "7"], "answer": n % 3}
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
