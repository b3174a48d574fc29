"""ONE'S OWN JSON LINES -> TASK. Questions with choices, or with an answer to be written."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from xverse.errors import XverseError
from xverse.evals.item import LETTERS, Item, Task, labels, lettered
from xverse.evals.tasks.sentences import lines_of

KEYS = {"question", "choices", "answer", "group"}


def own_task(file: Path) -> Task:
    """A task of a file of {"question", "choices", "answer"}, the answer being a letter or a place
    from 0 on, or of {"question", "answer"}, whose answer has to be written; "group" is free.

    Named after the file. XverseError, with the number of the line, for anything else.
    """
    if not file.is_file():
        raise XverseError(
            f"There is no file {str(file)!r} of questions.",
            "A task that ends in .jsonl is a file of one's own.",
            "Correct --tasks.",
        )
    written = "choices" not in next(iter(_rows(file)), {})
    load = partial(_items, file, written)
    facts: dict[str, Any] = {"folder": str(file.parent.resolve())}
    if written:
        facts |= {"grade": same_text, "max_tokens": 256, "stop": ("\nQuestion:",)}
    return Task(file.stem, file.stem, "writing" if written else "choice", load, **facts)


def same_text(item: Item, said: str) -> float:
    """Whether the first line of the answer is the right one, but for case and spaces around."""
    first = said.strip().partition("\n")[0]
    return float(first.strip().casefold() == str(item.reference["answer"]).strip().casefold())


def _items(file: Path, written: bool, folder: Path, shots: int) -> Iterator[Item]:
    """The first `shots` questions are examples, and are not asked."""
    rows = _rows(file)
    for number, row in enumerate(rows, 1):
        if not {"question", "answer"} <= row.keys() <= KEYS or ("choices" not in row) != written:
            raise _bad_line(file, number, f"It has the keys {', '.join(row) or 'none'}.")
    solved = tuple(
        f"{_asked(row)} {_answer(file, n, row)}\n\n" for n, row in enumerate(rows[:shots], 1)
    )
    for number, row in enumerate(rows[shots:], shots + 1):
        answer, group = _answer(file, number, row), str(row.get("group", ""))
        item = Item(str(number), _asked(row), group, shots=solved, reference={"answer": answer})
        if not written:
            gold = LETTERS.index(answer)
            options = labels(len(row["choices"]))
            item = Item(str(number), _asked(row), group, "", solved, options, gold=gold)
        yield item


def _asked(row: dict[str, Any]) -> str:
    return lettered(f"Question: {row['question']}", row.get("choices", ()))


def _answer(file: Path, number: int, row: dict[str, Any]) -> str:
    """The answer as it is written after "Answer: "."""
    answer, choices = row["answer"], row.get("choices")
    if choices is None:
        return str(answer)
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return LETTERS[answer]
    if isinstance(answer, str) and answer in (*LETTERS[: len(choices)],):
        return answer
    raise _bad_line(file, number, f"The answer {answer!r:.40} is none of {len(choices)} choices.")


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return lines_of(file)
    except ValueError as error:
        raise XverseError(
            f"{file} is not JSON lines.", str(error), "Write one JSON object a line."
        ) from error


def _bad_line(file: Path, number: int, why: str) -> XverseError:
    return XverseError(
        f"Question {number} of {file} cannot be asked.",
        why,
        'Write {"question": ..., "choices": [...], "answer": "B"}, or without choices.',
    )
