"""JSON LINES -> ITEMS. Lettered questions: RACE-M without examples, CommonsenseQA with seven."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xverse.evals.item import LETTERS, Item, Task, labels, lettered
from xverse.evals.tasks.sentences import lines_of

RACE_HEADER = "Read the article, and answer the question by replying A, B, C or D.\n\n"


def race(folder: Path, shots: int) -> Iterator[Item]:
    """samples_m.jsonl has the test questions, fewshot_m.jsonl examples, of which 0 are published.

    An article stands before its question, so that what its questions share is computed once.
    """
    solved = [
        f"{_article(row)} {LETTERS[row['ideal']]}\n\n"
        for row in lines_of(folder / "fewshot_m.jsonl")[:shots]
    ]
    for place, row in enumerate(lines_of(folder / "samples_m.jsonl")):
        yield Item(
            name=str(place),
            header=RACE_HEADER,
            shots=tuple(solved),
            question=_article(row),
            options=labels(len(row["options"])),
            gold=row["ideal"],
        )


def commonsenseqa(folder: Path, shots: int) -> Iterator[Item]:
    """dev_rand_split.jsonl has the questions, the first of train_rand_split.jsonl are examples."""
    train = lines_of(folder / "train_rand_split.jsonl")
    solved = [f"{_stem(row)} {row['answerKey']}\n\n" for row in train[:shots]]
    for row in lines_of(folder / "dev_rand_split.jsonl"):
        yield Item(
            name=row["id"],
            shots=tuple(solved),
            question=_stem(row),
            options=labels(len(row["question"]["choices"])),
            gold=LETTERS.index(row["answerKey"]),
        )


def _article(row: dict[str, Any]) -> str:
    return f"{row['passage']}\n\n" + lettered(f"Q: {row['question']}", row["options"])


def _stem(row: dict[str, Any]) -> str:
    choices = [choice["text"] for choice in row["question"]["choices"]]
    return lettered(f"Question: {row['question']['stem']}", choices)


TASKS = (
    Task("race-m", "RACE-M", "choice", race, "race-middle"),
    Task("commonsenseqa", "CommonsenseQA", "choice", commonsenseqa, "commonsenseqa", shots=7),
)
