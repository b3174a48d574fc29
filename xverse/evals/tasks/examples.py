"""EXAMPLES.JSON -> DIALOGUES. What the model cards show a chat model doing, ten kinds of it.

A row has a category, what the user says in turn, and checks (`evals/checks`) of the answers. With
`tools` the first turn is the published preamble: the tools, the time `now`, and the question.
"""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from xverse.errors import XverseError
from xverse.evals.checks import judge
from xverse.evals.item import Item, Task
from xverse.text.tools import render_tools

FILE = Path(__file__).with_name("examples.json")
MAX_TOKENS = 384  # five answers and their questions have room in 2,048


def examples(folder: Path, shots: int) -> Iterator[Item]:
    """The package has the file; the folder of the benchmarks is not looked at."""
    if shots:
        raise XverseError(
            f"The examples cannot be asked after {shots} others.",
            "They are conversations, each from its beginning.",
            "Leave out --shots, or the task.",
        )
    for row in json.loads(FILE.read_text("utf-8")):
        first, *turns = row["turns"]
        if "tools" in row:
            first = render_tools(row["tools"], first, now=datetime.fromisoformat(row["now"]))
        checks = {"checks": row["checks"]}
        yield Item(row["name"], first, row["category"], reference=checks, turns=tuple(turns))


TASKS = (
    Task(
        "examples",
        "Examples of the model cards",
        "dialogue",
        examples,
        judge=judge,
        max_tokens=MAX_TOKENS,
        note="Every conversation, with its verdict and the reason, is in transcripts.md.",
    ),
)
