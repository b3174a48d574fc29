"""CORPUS + TASKS -> OVERLAP. Which questions a training corpus has already seen, by n-grams.

After GPT-3's check (Brown et al. 2020, appendix C): a question counts as seen where any 13 words of
it in a row stand in the corpus; letters of scripts without spaces are words. Shorter questions must
stand there whole, and those under MIN_WORDS are not judged.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xverse.evals.item import Item, Task
from xverse.evals.report import markdown_table
from xverse.evals.tasks.texts import documents

NGRAM, MIN_WORDS = 13, 6
# A word of letters and digits; each ideograph and kana is one of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
Gram = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """Of `judged` questions of a task, `seen` were found; `names` are theirs."""

    task: str
    judged: int
    too_short: int
    seen: int
    names: tuple[str, ...]


def overlap(tasks: Sequence[Task], data: Path, corpus: Path) -> list[Overlap]:
    """Look for the questions of the tasks in every .txt and .jsonl file below `corpus`.

    Memory is the questions' n-grams; the corpus is read once. XverseError for missing data.
    """
    asked = {task.name: task.items(data, shots=0) for task in tasks}
    owners: dict[int, dict[Gram, set[tuple[str, str]]]] = {}
    judged = dict.fromkeys(asked, 0)
    for name, items in asked.items():
        for item in items:
            words = words_of(_text(item))
            if len(words) < MIN_WORDS:
                continue
            judged[name] += 1
            size = min(NGRAM, len(words))
            for gram in _grams(words, size):
                owners.setdefault(size, {}).setdefault(gram, set()).add((name, item.name))
    seen = _seen(owners, (item.question for item in documents(corpus, 0)))
    return [
        Overlap(
            name,
            judged[name],
            len(items) - judged[name],
            sum((name, item.name) in seen for item in items),
            tuple(item.name for item in items if (name, item.name) in seen),
        )
        for name, items in asked.items()
    ]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without spaces and punctuation."""
    return _WORD.findall(text.lower())


def as_markdown(found: Sequence[Overlap]) -> str:
    """The overlaps for people."""
    rows = [
        (
            each.task,
            str(each.judged),
            str(each.too_short),
            str(each.seen),
            f"{100 * each.seen / max(each.judged, 1):.2f} %",
        )
        for each in found
    ]
    head = ("Task", "Questions", "Too short", "Seen", "Share")
    return "\n".join(["# Contamination", "", *markdown_table(head, rows)])


def as_json(found: Sequence[Overlap]) -> dict[str, object]:
    """The overlaps as JSON."""
    return {"ngram": NGRAM, "tasks": [asdict(each) for each in found]}


def _text(item: Item) -> str:
    """What of a question would give it away: itself, without the letters of its answers."""
    return item.question or " ".join(item.stems)


def _grams(words: Sequence[str], size: int) -> Iterator[Gram]:
    return (tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _seen(
    owners: dict[int, dict[Gram, set[tuple[str, str]]]], texts: Iterable[str]
) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for text in texts:
        words = words_of(text)
        for size, grams in owners.items():
            for gram in _grams(words, size):
                found |= grams.get(gram, set())
    return found
