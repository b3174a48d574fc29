"""Benchmarks are asked in the published words, to the byte, and all of their questions."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data import shared_data
from tests.evals.fake import FakeDoor, own_questions
from xverse.errors import XverseError
from xverse.evals.figures import figure_of
from xverse.evals.harness import Options, run_tasks
from xverse.evals.item import Item
from xverse.evals.tables import published
from xverse.evals.tasks import PUBLISHED, all_tasks, tasks_of
from xverse.evals.tasks.exams import C_EVAL_CATEGORIES, SUBJECTS
from xverse.evals.tasks.long import finds_needle, overlap_f1, right_paragraph, rouge_l
from xverse.evals.tasks.own import own_task, same_text
from xverse.evals.tasks.writing import same_number

COUNTS = {
    "mmlu": 14042,
    "mmlu-val": 1531,
    "ceval": 1346,
    "cmmlu": 11582,
    "race-m": 1436,
    "commonsenseqa": 1221,
    "piqa": 1838,
    "gsm8k": 1319,
    "humaneval": 164,
    "arc-easy": 2376,
    "arc-challenge": 1172,
    "hellaswag": 10042,
    "winogrande": 1267,
    "boolq": 3270,
    "openbookqa": 500,
    "lambada": 5153,
    "longbench-multi-news": 200,
    "longbench-multifieldqa-zh": 200,
    "longbench-passage-retrieval-zh": 200,
}
SHOTS = dict(zip(PUBLISHED, (5, 5, 5, 5, 5, 5, 0, 7, 0, 4, 0), strict=True))


@pytest.mark.parametrize("name", COUNTS)
def test_every_question_is_asked_once(name: str) -> None:
    items = all_tasks()[name].items(shared_data("eval"))
    assert len(items) == COUNTS[name]
    assert {len(item.shots) for item in items} == {all_tasks()[name].shots}


def test_published_shots() -> None:
    assert {name: all_tasks()[name].shots for name in PUBLISHED} == SHOTS


def test_subjects_and_categories() -> None:
    assert {name: len(known) for name, known in SUBJECTS.items()} == {
        "mmlu": 57,
        "ceval": 52,
        "cmmlu": 67,
    }
    assert Counter(SUBJECTS["mmlu"].values()) == {
        "STEM": 18,
        "Others": 14,
        "Humanities": 13,
        "Social": 12,
    }
    assert Counter(C_EVAL_CATEGORIES.values()) == {
        "STEM": 20,
        "Humanities": 11,
        "Others": 11,
        "Social": 10,
    }


def test_mmlu_is_shown_as_hendrycks_shows_it() -> None:
    item = all_tasks()["mmlu"].items(shared_data("eval"), shots=1)[0]
    assert item.prompt(1) == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\n"
        "A. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n"
        "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert item.options == (" A", " B", " C", " D")


class Hendrycks:
    """evaluate.py of hendrycks/test, written anew from its description."""

    letters = ("A", "B", "C", "D")

    def __init__(self, folder: Path, door: FakeDoor) -> None:
        self.folder, self.door = folder, door

    def read(self, split: str, subject: str) -> list[list[str]]:
        with (self.folder / split / f"{subject}_{split}.csv").open(newline="") as lines:
            return list(csv.reader(lines))

    def example(self, row: Sequence[str], answered: bool) -> str:
        text = row[0]
        for letter, choice in zip(self.letters, row[1:5], strict=True):
            text += "\n" + letter + ". " + choice
        text += "\nAnswer:"
        return text + f" {row[5]}\n\n" if answered else text

    def correct(self, subject: str) -> list[bool]:
        words = "".join(" " + word for word in subject.split("_"))
        prompt = "The following are multiple choice questions (with answers) about "
        prompt += words + ".\n\n"
        for row in self.read("dev", subject)[:5]:
            prompt += self.example(row, True)
        found = []
        for row in self.read("test", subject):
            shown = prompt + self.example(row, False)
            values = [self.door.logit(shown, f" {letter}") for letter in self.letters]
            best = max(values)
            found.append(self.letters[values.index(best)] == row[5])
        return found


def test_scores_are_those_of_hendrycks_on_all_57_subjects(tmp_path: Path) -> None:
    data = shared_data("eval")
    door = FakeDoor()
    (result,) = run_tasks(door, tasks_of("mmlu"), data, tmp_path, Options())
    figure = figure_of(result)
    theirs = {s: Hendrycks(data / "mmlu", door).correct(s) for s in SUBJECTS["mmlu"]}
    assert len(theirs) == 57
    for subject, correct in theirs.items():
        assert figure.groups[subject].value == pytest.approx(100 * sum(correct) / len(correct))
    everything = [each for correct in theirs.values() for each in correct]
    assert figure.value == pytest.approx(100 * sum(everything) / len(everything), abs=1e-12)
    for category, mean in figure.categories.items():
        some = [x for s, c in theirs.items() if SUBJECTS["mmlu"][s] == category for x in c]
        assert (mean.n, mean.value) == (len(some), pytest.approx(100 * sum(some) / len(some)))


def test_published_averages_follow_from_published_categories() -> None:
    """C-Eval's average is that of its 52 subjects; both published rows come out."""
    subjects = Counter(C_EVAL_CATEGORIES.values())
    for row in published()["categories"]["ceval"].values():
        average = sum(row[name] * count for name, count in subjects.items()) / 52
        assert round(average, 1) == row["Average"]


def test_only_single_answers_are_asked_and_none_is_its_own_example() -> None:
    data = shared_data("eval")
    for name, count in (("agieval", 5915), ("gaokao-bench", 1503), ("gaokao-english", 411)):
        items = all_tasks()[name].items(data)
        assert len(items) == count
        for item in items:
            assert 0 <= item.gold < len(item.options)
            assert len(item.shots) == 5
            assert not any(shot.startswith(item.question) for shot in item.shots)
    assert "stand in" in all_tasks()["gaokao-english"].note


def test_own_questions_become_a_task(tmp_path: Path) -> None:
    task = own_task(own_questions(tmp_path))
    items = task.items(tmp_path, shots=2)
    assert len(items) == 10
    assert items[0].prompt(2) == (
        "Question: What is 0 + 0?\nA. 0\nB. 0\nC. 7\nAnswer: A\n\n"
        "Question: What is 1 + 1?\nA. 1\nB. 2\nC. 7\nAnswer: B\n\n"
        "Question: What is 2 + 2?\nA. 2\nB. 4\nC. 7\nAnswer:"
    )
    assert [item.gold for item in items[:3]] == [2, 0, 1]
    written = tmp_path / "written.jsonl"
    written.write_text('{"question": "Capital of France?", "answer": "Paris"}\n')
    (item,) = own_task(written).items(tmp_path)
    assert same_text(item, " paris \nQuestion:") == 1.0
    assert same_text(item, "It is Paris") == 0.0


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "a", "choices": ["x"], "answer": "B"}',
        '{"question": "a", "choices": ["x", "y"], "answer": 2}',
        '{"question": "a", "choices": ["x"], "answer": "A", "weight": 3}',
        '{"choices": ["x"], "answer": "A"}',
        "not json",
    ],
)
def test_bad_questions_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "fine", "choices": ["x", "y"], "answer": 1}\n' + line + "\n")
    with pytest.raises(XverseError, match=r"Question 2|JSON lines"):
        own_task(file).items(tmp_path)


def test_missing_and_damaged_data_are_told(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="is not in"):
        all_tasks()["mmlu"].items(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text(json.dumps({"no": "question"}) + "\n")
    with pytest.raises(XverseError, match="damaged"):
        all_tasks()["gsm8k"].items(tmp_path)
    with pytest.raises(XverseError, match="Did you mean 'mmlu'"):
        tasks_of("mmllu")
    with pytest.raises(XverseError, match="No task"):
        tasks_of(" , ")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" 6 * 3 = 18\n#### 18", 1.0),
        (" so there are 1,018 of them", 0.0),
        (" 18 in all, that is $18.00.", 1.0),
        (" #### 17\n 18", 0.0),
        ("", 0.0),
        (" -18", 0.0),
    ],
)
def test_sums_are_compared_as_numbers(said: str, right: float) -> None:
    assert same_number(Item("0", "", reference={"number": "18"}), said) == right


def test_scores_of_written_answers() -> None:
    answer = Item("0", "", reference={"answer": "厦门大学。"})
    assert overlap_f1(answer, "厦门大学") == 1.0
    assert overlap_f1(answer, "") == 0.0
    police = Item("0", "", reference={"answer": "police kill the gunman"})
    # Lin 2004: the longest common subsequence has 3 of 4 words.
    assert rouge_l(police, "police killed the gunman") == pytest.approx(0.75)
    assert right_paragraph(Item("0", "", reference={"answer": "段落27"}), "段落27，或2") == 0.5
    needle = Item("0", "", reference={"number": "123456"})
    assert finds_needle(needle, " 123456.") == 1.0
    assert finds_needle(needle, "12345 or 123456") == 0.0
