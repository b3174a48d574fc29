"""The journal: what a killed process left is mended, and the steps are those the run has now."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from xverse.errors import XverseError
from xverse.train.journal import Journal, last_steps, plot, progress_line, read_events


def test_a_line_that_was_cut_off_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note("step", step=0, loss=1.5)
    journal.note("bad", step=1, loss=float("nan"))
    journal.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["event"] for event in read_events(tmp_path / "metrics.jsonl")] == ["step", "bad"]
    again = Journal(tmp_path)
    again.note("step", step=1, loss=1.25)
    assert [event.get("loss") for event in again.events()] == [1.5, "nan", 1.25]


def test_another_line_that_is_no_json_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "step"}\nnonsense\n{}\n')
    with pytest.raises(XverseError, match="line 2"):
        list(read_events(tmp_path / "metrics.jsonl"))


def test_a_repeated_step_counts_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for event, step in [("step", 0), ("step", 1), ("step", 2), ("ready", 1), ("step", 1)]:
        journal.note(event, step=step, loss=float(step))
    assert [facts["step"] for facts in last_steps(journal.events())] == [0, 1]


STEP: dict[str, Any] = {
    "event": "step",
    "step": 9,
    "loss": 2.5,
    "norm": 0.5,
    "rate": 1e-3,
    "tokens_per_second": 12345.6,
    "pace": 2.0,
}


def test_the_line_for_people() -> None:
    line = progress_line(STEP, 3000)
    assert "step 10/3000" in line
    assert "12,346 tok/s" in line
    assert "left 1:39:40" in line
    assert "MFU 50.0% strict, 55.0% by PaLM" in progress_line(
        STEP | {"mfu": 0.5, "mfu_palm": 0.55}, 10
    )


def test_the_plot_is_a_png_or_a_word_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    plot([STEP, STEP | {"step": 10, "mfu": 0.5}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    plot([STEP], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_tensorboard_that_is_not_there_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(XverseError, match="TensorBoard"):
        Journal(tmp_path, tensorboard=True)
