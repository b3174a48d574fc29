"""JSON LINES -> ITEMS. Which sentence goes on best: PIQA, ARC, HellaSwag, WinoGrande and others.

Whole continuations are compared, each after the same beginning: the protocol of the papers, in the
words in which lm-evaluation-harness asks.
"""

import bz2
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xverse.evals.item import Item, Task


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def piqa(folder: Path, shots: int) -> Iterator[Item]:
    """valid.jsonl has the questions, valid-labels.lst the answers; there are no examples."""
    _no_examples(shots)
    golds = (folder / "valid-labels.lst").read_text("utf-8").split()
    for place, (row, gold) in enumerate(zip(lines_of(folder / "valid.jsonl"), golds, strict=True)):
        choices = (f" {row['sol1']}", f" {row['sol2']}")
        question = f"Question: {row['goal']}\nAnswer:"
        yield Item(str(place), question, options=choices, gold=int(gold))


def arc(level: str, folder: Path, shots: int) -> Iterator[Item]:
    """samples_*.jsonl has the test questions, fewshot_*.jsonl the examples."""
    solved = [
        f"{_asked(row)} {row['choices'][row['answer']]}\n\n"
        for row in lines_of(folder / f"fewshot_{level}.jsonl")[:shots]
    ]
    for place, row in enumerate(lines_of(folder / f"samples_{level}.jsonl")):
        choices = tuple(f" {choice}" for choice in row["choices"])
        yield Item(
            str(place), _asked(row), shots=tuple(solved), options=choices, gold=row["answer"]
        )


def hellaswag(folder: Path, shots: int) -> Iterator[Item]:
    """A bz2 text of six lines an item: beginning, place of the right ending, four endings."""
    _no_examples(shots)
    file = folder / "hellaswag_val_full.txt.bz2"
    with bz2.open(file, "rt", encoding="utf-8") as text:
        lines = text.read().splitlines()
    for place in range(0, len(lines) - 5, 6):
        beginning, gold, *endings = lines[place : place + 6]
        choices = tuple(f" {ending}" for ending in endings)
        yield Item(str(place // 6), beginning, options=choices, gold=int(gold))


def winogrande(folder: Path, shots: int) -> Iterator[Item]:
    """Two beginnings, one for each person, and one end: after which is the end likelier?"""
    _no_examples(shots)
    for place, row in enumerate(lines_of(folder / "winogrande.jsonl")):
        stems = tuple(row["context_options"])
        ends = (f" {row['continuation']}",) * len(stems)
        yield Item(str(place), "", options=ends, stems=stems, gold=row["gold"])


def continued(name: str, ending: str, folder: Path, shots: int) -> Iterator[Item]:
    """`name`.jsonl with query, choices and gold; `ending` goes between query and choice."""
    _no_examples(shots)
    for place, row in enumerate(lines_of(folder / f"{name}.jsonl")):
        choices = tuple(f" {choice}" for choice in row["choices"])
        yield Item(str(place), row["query"] + ending, options=choices, gold=row["gold"])


def lambada(folder: Path, shots: int) -> Iterator[Item]:
    """The last word of a passage: right is what greedy decoding would write."""
    _no_examples(shots)
    for place, row in enumerate(lines_of(folder / "lambada_openai.jsonl")):
        yield Item(str(place), row["context"], options=(f" {row['continuation']}",), gold=0)


def _asked(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _no_examples(shots: int) -> None:
    if shots:
        raise ValueError(f"{shots} examples are asked for, and the files have none")


def _task(name: str, title: str, load: Any, folder: str, **options: Any) -> Task:
    return Task(name, title, "choice", load, folder, **options)


TASKS: Sequence[Task] = (
    _task("piqa", "PIQA", piqa, "piqa"),
    _task("arc-easy", "ARC easy", partial(arc, "easy"), "arc"),
    _task("arc-challenge", "ARC challenge", partial(arc, "challenge"), "arc", norm="characters"),
    _task("hellaswag", "HellaSwag", hellaswag, "hellaswag", norm="characters"),
    _task("winogrande", "WinoGrande", winogrande, "winogrande"),
    _task(
        "openbookqa",
        "OpenBookQA",
        partial(continued, "openbook_qa", ""),
        "openbookqa",
        norm="characters",
    ),
    _task("boolq", "BoolQ", partial(continued, "boolq", "\nAnswer:"), "boolq"),
    _task("lambada", "LAMBADA", lambada, "lambada", greedy=True),
)
