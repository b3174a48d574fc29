"""JSON LINES -> ITEMS. What has to be written out: GSM8K's sums, HumanEval's functions."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

from xverse.evals.item import Item, Task
from xverse.evals.sandbox import run_program
from xverse.evals.tasks.sentences import lines_of

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def gsm8k(folder: Path, shots: int) -> Iterator[Item]:
    """test.jsonl has the questions, the first of train.jsonl are the examples."""
    train = lines_of(folder / "train.jsonl")
    solved = [f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in train[:shots]]
    for place, row in enumerate(lines_of(folder / "test.jsonl")):
        yield Item(
            name=str(place),
            shots=tuple(solved),
            question=f"Question: {row['question']}\nAnswer:",
            reference={"number": row["answer"].rpartition("####")[2].strip()},
        )


def same_number(item: Item, said: str) -> float:
    """Whether the number after "####", or else the last one there is, is the right one."""
    marked = NUMBER.findall(said.partition("####")[2].partition("\n")[0])
    numbers = marked[:1] or NUMBER.findall(said)[-1:]
    wanted = _value(str(item.reference["number"]))
    return float(any(_value(number) == wanted for number in numbers))


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))


def humaneval(folder: Path, shots: int) -> Iterator[Item]:
    """The published gzip of 164 functions to be written."""
    if shots:
        raise ValueError(f"{shots} examples are asked for, and the file has none")
    with gzip.open(folder / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            program = {"test": row["test"], "entry_point": row["entry_point"]}
            yield Item(row["task_id"], row["prompt"], reference=program)


def passes(item: Item, said: str) -> float:
    """Whether the function passes its tests, in the sandbox. A whole function in a fenced block,
    as chat models answer, is taken for what it is."""
    name, test = item.reference["entry_point"], item.reference["test"]
    blocks = re.findall(r"```(?:python)?\n(.*?)```", said, re.DOTALL)
    whole = next((block for block in blocks if f"def {name}" in block), None)
    # The prompt ends within a function that has only a docstring so far.
    body = item.question + (said if whole is None else f"    pass\n\n{whole}")
    return float(run_program(f"{body}\n{test}\ncheck({name})\n").passed)


TASKS = (
    Task(
        "gsm8k",
        "GSM8K",
        "writing",
        gsm8k,
        "gsm8k",
        shots=4,
        grade=same_number,
        max_tokens=384,
        stop=("Question:", "\n\n\n"),
        note="The number after ####, or else the last number of the answer, is compared.",
    ),
    Task(
        "humaneval",
        "HumanEval",
        "writing",
        humaneval,
        "humaneval",
        grade=passes,
        max_tokens=512,
        stop=("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint("),
        sandboxed=True,
        note="pass@1 of the greedy answer.",
    ),
)
