"""The Trainer's files: what a run that was killed wrote beyond its checkpoint is taken back."""

import json
from pathlib import Path
from typing import Any

from xverse.train.journal import Journal
from xverse.train.trainer_log import TrainerLog


def listener(folder: Path) -> TrainerLog:
    return TrainerLog(folder, steps=8, steps_per_epoch=4.0, every=2, rows_per_step=16)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "trainer_log.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def make(journal: Journal, first: int, last: int, *, offset: float = 0.0) -> None:
    for step in range(first, last):
        journal.note("step", step=step, loss=10.0 - step + offset, norm=1.0, rate=1e-3)


def test_a_run_that_goes_on_repeats_no_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", listener=listener(tmp_path))
    journal.note("start")
    journal.note("ready", step=0, seconds=0.1)
    make(journal, 0, 4)
    journal.note("evaluate", step=4, seconds=0.5, loss=6.5)
    make(journal, 4, 6, offset=50.0)  # lost with the process
    journal.close()
    assert [line["current_steps"] for line in lines(tmp_path)] == [2, 4, 4, 6]

    log = listener(tmp_path)
    journal = Journal(tmp_path / "run", listener=log)
    journal.note("start")
    journal.note("ready", step=5, seconds=0.1)  # one step of the pair is known, and one made again
    make(journal, 5, 8)
    journal.note("best", step=4, loss=6.5)
    journal.close()
    log.finish()
    found = lines(tmp_path)
    assert [line["current_steps"] for line in found] == [2, 4, 4, 6, 8]
    assert [line["loss"] for line in found if "loss" in line] == [9.5, 7.5, (56.0 + 5.0) / 2, 3.5]
    assert found[-1]["percentage"] == 100
    assert found[-1]["remaining_time"] == "0:00:00"
    state = json.loads((tmp_path / "trainer_state.json").read_text("utf-8"))
    assert (state["global_step"], state["best_global_step"], state["epoch"]) == (8, 4, 2.0)
    assert [entry["step"] for entry in state["log_history"]] == [2, 4, 4, 6, 8]
    log.plot()
    assert (tmp_path / "training_loss.png").exists()
    assert (tmp_path / "training_eval_loss.png").exists()
