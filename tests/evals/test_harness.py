"""Runs that are killed go on where they stopped, and report the same to the last byte."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.evals.fake import FakeDoor, own_questions
from tests.tiny_model import write_published_folder
from xverse.errors import XverseError
from xverse.evals.door import Ask, Prompt, Reading
from xverse.evals.evaluate import ITEMS, evaluate
from xverse.evals.harness import Options, run_tasks
from xverse.evals.item import Item, Task
from xverse.evals.journal import LINES
from xverse.evals.report import FILES

ROOT = Path(__file__).resolve().parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a report, and what came of every item."""
    names = [*FILES, ITEMS, *(f"plots/{p.name}" for p in (folder / "plots").glob("*.png"))]
    return {name: (folder / name).read_bytes() for name in names}


def test_killed_at_random_points_the_report_is_the_same(tmp_path: Path) -> None:
    own = str(own_questions(tmp_path, 400))
    whole = evaluate(FakeDoor(), own, out=tmp_path / "whole", data=tmp_path)
    assert (tmp_path / "whole" / "plots" / "bars.png").stat().st_size > 1000
    expected = contents(whole.folder)
    chance = random.Random(0)
    folder = tmp_path / "killed"
    for attempt in range(10):
        try:
            door = FakeDoor(dies_after=chance.randint(0, 2))
            evaluate(door, own, out=folder, data=tmp_path, plots=False)
            break
        except KeyboardInterrupt:
            journal = folder / LINES
            if journal.exists() and attempt % 2:  # a line that was half on the disk
                with journal.open("r+b") as file:
                    file.truncate(max(0, journal.stat().st_size - chance.randint(1, 40)))
    evaluate(FakeDoor(), own, out=folder, data=tmp_path)
    assert contents(folder) == expected
    again = FakeDoor(dies_after=0)  # nothing is asked any more
    evaluate(again, own, out=folder, data=tmp_path)
    assert contents(folder) == expected


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    model, own = tmp_path / "model", str(own_questions(tmp_path, 140))
    write_published_folder(model, shards=1)
    words = [sys.executable, "-m", "xverse", "evaluate", str(model), "--tasks", own]
    words += ["--data", str(tmp_path), "--no-plots", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*words, str(tmp_path / "killed")],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    journal = tmp_path / "killed" / LINES
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert journal.exists(), errors.decode()
    from xverse.evals.evaluate import open_door

    for name in ("killed", "whole"):
        evaluate(open_door(model), own, out=tmp_path / name, data=tmp_path, plots=False)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    own = str(own_questions(tmp_path))
    evaluate(FakeDoor(), own, out=tmp_path / "out", data=tmp_path, plots=False)
    for door, chat in ((FakeDoor("other"), False), (FakeDoor(), True)):
        with pytest.raises(XverseError, match="another run"):
            evaluate(door, own, out=tmp_path / "out", data=tmp_path, chat=chat, plots=False)


def test_changed_questions_are_asked_anew(tmp_path: Path) -> None:
    own = own_questions(tmp_path)
    first = evaluate(FakeDoor(), str(own), out=tmp_path / "out", data=tmp_path, plots=False)
    own.write_text(own.read_text().replace("What is 3", "How much is 3"))
    door = FakeDoor()
    second = evaluate(door, str(own), out=tmp_path / "out", data=tmp_path, plots=False)
    assert door.asked
    assert first.figures[0].task_hash != second.figures[0].task_hash
    assert first.figures[0].prompt_hash != second.figures[0].prompt_hash


def test_examples_go_when_the_context_is_full_and_what_never_fits_is_counted(
    tmp_path: Path,
) -> None:
    shots = tuple(f"{n} example\n\n" for n in range(5))
    items = [
        Item("short", "Question", shots=shots, options=(" A", " B"), gold=0),
        Item("long", "Q" * 60, shots=shots, options=(" A", " B"), gold=0),
        Item("endless", "Q" * 200, shots=shots, options=(" A", " B"), gold=0),
    ]
    task = Task("t", "T", "choice", lambda folder, count: items, shots=5)
    door = FakeDoor()
    door.context = 100
    (result,) = run_tasks(door, [task], tmp_path, tmp_path / "out", Options())
    by_name = {str(outcome["name"]): outcome for outcome in result.outcomes}
    assert [by_name[name].get("shots") for name in ("short", "long", "endless")] == [5, 3, None]
    assert by_name["endless"] == {"name": "endless", "score": 0.0, "too_long": True}
    assert door.asked[1].prompt.text == "".join(shots[:3]) + "Q" * 60  # the last ones go first


def test_long_texts_lose_their_middle_and_this_is_told(tmp_path: Path) -> None:
    items = [Item("a", "begin" + "x" * 500 + "end"), Item("b", "begin end")]
    task = Task(
        "t", "T", "writing", lambda f, n: items, grade=lambda i, s: 1.0, max_tokens=8, cut="middle"
    )
    door = FakeDoor()
    door.context = 100
    (result,) = run_tasks(door, [task], tmp_path, tmp_path / "out", Options())
    assert [outcome.get("cut", False) for outcome in result.outcomes] == [True, False]
    assert door.shown[0].startswith("begin")
    assert door.shown[0].endswith("end")
    assert len(door.shown[0]) <= 92


def test_limits_draw_the_same_questions_by_the_seed(tmp_path: Path) -> None:
    own = str(own_questions(tmp_path, 50))
    names = []
    for place, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(place)
        report = evaluate(FakeDoor(), own, out=out, data=tmp_path, limit=9, seed=seed, plots=False)
        assert (report.figures[0].n, report.figures[0].seed) == (9, seed)
        names.append((out / ITEMS).read_text())
    assert names[0] == names[1] != names[2]
    for bad in ({"limit": 0}, {"shots": -1}):
        with pytest.raises(XverseError, match="cannot be"):
            Options(**bad)


class _TokenizingDoor(FakeDoor):
    """Answers a batch only when the prompts of the next one have been tokenized."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.batch = 4
        self.come = [threading.Event() for _ in range(batches)]
        self.read_batches = 0

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        if threading.current_thread() is not threading.main_thread():
            next(event for event in self.come if not event.is_set()).set()
        return super().lengths(prompts)

    def read(self, asks: Sequence[Ask], namespace: str) -> list[Reading]:
        self.read_batches += 1
        assert all(event.wait(60) for event in self.come[: self.read_batches + 1])
        assert not any(event.is_set() for event in self.come[self.read_batches + 1 :])
        return super().read(asks, namespace)


def test_the_next_questions_are_tokenized_while_these_are_asked(tmp_path: Path) -> None:
    own = str(own_questions(tmp_path, 18))
    door = _TokenizingDoor(5)
    evaluate(door, own, out=tmp_path / "a", data=tmp_path, plots=False)
    assert door.read_batches == 5
    whole = FakeDoor()
    whole.batch = 4
    evaluate(whole, own, out=tmp_path / "b", data=tmp_path, plots=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_cannot_be_tokenized_ends_the_run(tmp_path: Path) -> None:
    class Door(FakeDoor):
        def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
            raise XverseError("The text can't be encoded.", "It is no text.", "Give another.")

    with pytest.raises(XverseError, match="can't be encoded"):
        evaluate(Door(), str(own_questions(tmp_path)), out=tmp_path / "out", data=tmp_path)
