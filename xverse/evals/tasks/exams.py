"""CSV -> ITEMS. The exams in subjects, asked as hendrycks/test asks: MMLU, C-Eval, CMMLU."""

import csv
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from xverse.evals.item import LETTERS, Item, Task, labels, lettered

SUBJECTS = json.loads(Path(__file__).with_name("subjects.json").read_text("utf-8"))
# "about" is followed by two spaces: hendrycks/test puts one before every word of the subject.
HEADER = "The following are multiple choice questions (with answers) about  {}.\n\n"
C_EVAL_NAMES: dict[str, str] = {key: name for key, (name, _) in SUBJECTS["ceval"].items()}
C_EVAL_CATEGORIES = {key: category for key, (_, category) in SUBJECTS["ceval"].items()}


def subject_name(key: str) -> str:
    """A subject as words: "abstract_algebra" is "abstract algebra"."""
    return key.replace("_", " ")


def examples(rows: Sequence[Sequence[str]], count: int) -> tuple[str, ...]:
    """The first rows as solved examples. A row is a question, its choices and the right letter."""
    return tuple(f"{lettered(q, choices)} {gold}\n\n" for q, *choices, gold in rows[:count])


def exam_item(
    name: str, group: str, row: Sequence[str], shots: tuple[str, ...], about: str
) -> Item:
    """One question after its header and examples."""
    question, *choices, gold = row
    return Item(
        name=name,
        group=group,
        header=HEADER.format(about),
        shots=shots,
        question=lettered(question, choices),
        options=labels(len(choices)),
        gold=LETTERS.index(gold),
    )


def mmlu(split: str, folder: Path, shots: int) -> Iterator[Item]:
    """dev/ has the examples, `split`/ the questions; the csv files have no header."""
    for subject in sorted(SUBJECTS["mmlu"]):
        dev = _rows(folder / "dev" / f"{subject}_dev.csv")
        about, solved = subject_name(subject), examples(dev, shots)
        for place, row in enumerate(_rows(folder / split / f"{subject}_{split}.csv")):
            yield exam_item(f"{subject}/{place}", subject, row, solved, about)


def ceval(folder: Path, shots: int) -> Iterator[Item]:
    """dev/ has the examples, val/ the questions: the answers of test/ were never published."""
    for subject in sorted(C_EVAL_NAMES):
        about = C_EVAL_NAMES[subject].lower()
        dev = _columns(folder / "dev" / f"{subject}_dev.csv", "question", "answer")
        rows = _columns(folder / "val" / f"{subject}_val.csv", "question", "answer")
        for place, row in enumerate(rows):
            name = f"{subject}/{place}"
            yield exam_item(name, subject, row, examples(dev, shots), about)


def cmmlu(folder: Path, shots: int) -> Iterator[Item]:
    """dev/ has the examples, test/ the questions."""
    for subject in sorted(SUBJECTS["cmmlu"]):
        dev = _columns(folder / "dev" / f"{subject}.csv", "Question", "Answer")
        rows = _columns(folder / "test" / f"{subject}.csv", "Question", "Answer")
        for place, row in enumerate(rows):
            name, about = f"{subject}/{place}", subject_name(subject)
            yield exam_item(name, subject, row, examples(dev, shots), about)


def _rows(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return [row for row in csv.reader(lines) if row]


def _columns(file: Path, question: str, answer: str) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        names = (question, *"ABCD", answer)
        return [[row[name] for name in names] for row in csv.DictReader(lines)]


MMLU = Task(
    "mmlu",
    "MMLU",
    "choice",
    partial(mmlu, "test"),
    "mmlu",
    shots=5,
    categories=SUBJECTS["mmlu"],
)
MMLU_VALIDATION = Task(
    "mmlu-val",
    "MMLU (validation)",
    "choice",
    partial(mmlu, "val"),
    "mmlu",
    shots=5,
    categories=SUBJECTS["mmlu"],
)
CEVAL = Task(
    "ceval",
    "C-Eval",
    "choice",
    ceval,
    "ceval",
    shots=5,
    categories=C_EVAL_CATEGORIES,
    by_group=True,  # as the published averages, which follow from the published categories
    note="The validation set: the answers of the test set were never published.",
)
CMMLU = Task("cmmlu", "CMMLU", "choice", cmmlu, "cmmlu", shots=5, categories=SUBJECTS["cmmlu"])
TASKS = (MMLU, MMLU_VALIDATION, CEVAL, CMMLU)
