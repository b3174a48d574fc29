"""JSON -> ITEMS. Exams of many kinds, of which single-answer questions are asked: AGIEval, GAOKAO.

GAOKAO-English is not to be had: the English papers of the other two stand in for it.
"""

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xverse.evals.item import LETTERS, Item, Task, labels, lettered
from xverse.evals.tasks.exams import HEADER, examples, subject_name

ENGLISH_PAPERS = ("2010-2013_English_MCQs",)
Row = list[str]  # question, choices, letter
Asked = tuple[str, Row]  # name and row


def agieval(folder: Path, shots: int) -> Iterator[Item]:
    """v1/*.jsonl has the questions, few_shot_prompts.csv the published examples, three to five of
    each; where they are fewer than `shots`, the first other questions of the file follow them."""
    published = _published_examples(folder / "few_shot_prompts.csv")
    files = sorted((folder / "v1").glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(2, "no jsonl files", str(folder / "v1"))
    for file in files:
        # Twice the same 206 questions; without their passages nobody could answer them.
        if file.stem != "sat-en-without-passage":
            yield from _agieval_file(file, published.get(file.stem, []), shots)


def gaokao_bench(folder: Path, shots: int) -> Iterator[Item]:
    """Objective_Questions/*.json; a record that asks several things is left out."""
    files = sorted((folder / "Objective_Questions").glob("*.json"))
    if not files:
        raise FileNotFoundError(2, "no json files", str(folder / "Objective_Questions"))
    for file in files:
        yield from _gaokao_file(file, shots)


def gaokao_english(folder: Path, shots: int) -> Iterator[Item]:
    """The English papers of AGIEval and of GAOKAO-Bench; `folder` has agieval/ and gaokao-bench/.

    Questions of a reading passage that GAOKAO-Bench asks together are in AGIEval one by one."""
    published = _published_examples(folder / "agieval" / "few_shot_prompts.csv")
    file = folder / "agieval" / "v1" / "gaokao-english.jsonl"
    yield from _agieval_file(file, published.get("gaokao-english", []), shots)
    for name in ENGLISH_PAPERS:
        file = folder / "gaokao-bench" / "Objective_Questions" / f"{name}.json"
        yield from _gaokao_file(file, shots)


def _agieval_file(file: Path, solved: Sequence[Row], shots: int) -> Iterator[Item]:
    with file.open(encoding="utf-8") as lines:
        rows = [(str(place), row) for place, line in enumerate(lines) if (row := _row_of(line))]
    yield from _items(file.stem, subject_name(file.stem.replace("-", " ")), rows, solved, shots)


def _gaokao_file(file: Path, shots: int) -> Iterator[Item]:
    records = json.loads(file.read_text("utf-8"))["example"]
    rows = [
        (str(record["index"]), [record["question"].strip(), *"ABCD", answer])
        for record in records
        if len(record["answer"]) == 1 and (answer := record["answer"][0].strip()) in (*"ABCD",)
    ]
    # Its questions have their choices in them already.
    about = re.sub(r"^[\d-]+_", "", file.stem).replace("_", " ")
    yield from _items(file.stem, about, rows, [], shots, written=True)


def _items(
    group: str,
    about: str,
    rows: Iterable[Asked],
    solved: Sequence[Row],
    shots: int,
    *,
    written: bool = False,
) -> Iterator[Item]:
    """Every row with its examples; no question is an example of its own."""
    rows = list(rows)
    for name, row in rows:
        others = [other for _, other in rows[: shots + 1] if other is not row]
        question, *choices, gold = row
        pool = [*solved, *others][:shots]
        text = f"{question}\nAnswer:" if written else lettered(question, choices)
        yield Item(
            name=f"{group}/{name}",
            group=group,
            header=HEADER.format(about),
            shots=_written_examples(pool) if written else examples(pool, shots),
            question=text,
            options=labels(len(choices)),
            gold=LETTERS.index(gold),
        )


def _written_examples(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(f"{question}\nAnswer: {gold}\n\n" for question, *_, gold in rows)


def _row_of(record: str | Mapping[str, Any]) -> Row | None:
    """An AGIEval record as a row; None where it has no choices, or not one right answer."""
    fields: Mapping[str, Any] = json.loads(record) if isinstance(record, str) else record
    options, label = fields["options"], fields["label"]
    letters = [*label] if isinstance(label, list) else [label]
    if not options or len(letters) != 1 or letters[0] not in (*LETTERS[: len(options)],):
        return None
    choices = [re.sub(r"^\([A-P]\)\s*", "", option) for option in options]
    passage = fields["passage"]
    question = f"{passage}\n{fields['question']}" if passage else fields["question"]
    return [question.strip(), *choices, letters[0]]


def _published_examples(file: Path) -> dict[str, list[Row]]:
    """The examples of each set: cells of a csv, each the text of a Python dictionary."""
    with file.open(encoding="utf-8", newline="") as lines:
        table = list(csv.DictReader(lines))
    found: dict[str, list[Row]] = {}
    for line in table:
        if line[""].startswith("sample"):
            for name, cell in line.items():
                if name and cell and (row := _row_of(ast.literal_eval(cell))) is not None:
                    found.setdefault(name, []).append(row)
    return found


AGIEVAL = Task(
    "agieval",
    "AGIEval",
    "choice",
    agieval,
    "agieval",
    shots=5,
    note="Questions with one right answer only.",
)
GAOKAO_BENCH = Task(
    "gaokao-bench",
    "GAOKAO-Bench",
    "choice",
    gaokao_bench,
    "gaokao-bench",
    shots=5,
    note="Records that ask one question with one right answer only.",
)
GAOKAO_ENGLISH = Task(
    "gaokao-english",
    "GAOKAO-English (stand-in)",
    "choice",
    gaokao_english,
    "",
    shots=5,
    note="Not the published set, which is not to be had: AGIEval's gaokao-english and the English "
    "multiple choice of GAOKAO-Bench stand in for it.",
)
TASKS = (AGIEVAL, GAOKAO_BENCH, GAOKAO_ENGLISH)
