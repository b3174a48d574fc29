"""The account: seconds by cause add up, and only what the run still has is productive."""

from typing import Any

import pytest

from xverse.train.account import account


def journal() -> list[dict[str, Any]]:
    """Two processes: the first dies after 4 steps with a checkpoint of 2; the second ends."""
    lines: list[dict[str, Any]] = [
        {"event": "start", "time": 0.0},
        {"event": "ready", "time": 10.0, "step": 0, "seconds": 10.0},
        {"event": "step", "time": 15.0, "step": 0, "seconds": 5.0},
        {"event": "step", "time": 16.0, "step": 1, "seconds": 1.0},
        {"event": "save", "time": 16.5, "step": 2, "seconds": 0.5},
        {"event": "step", "time": 17.5, "step": 2, "seconds": 1.0},
        {"event": "step", "time": 18.5, "step": 3, "seconds": 1.0},
        {"event": "start", "time": 118.5},
        {"event": "ready", "time": 128.5, "step": 2, "seconds": 10.0},
        {"event": "step", "time": 131.5, "step": 2, "seconds": 3.0},
        {"event": "bad", "time": 132.5, "step": 3, "seconds": 1.0},
        {"event": "step", "time": 133.5, "step": 3, "seconds": 1.0},
        {"event": "evaluate", "time": 135.5, "step": 4, "seconds": 2.0},
    ]
    return lines


def test_seconds_by_cause() -> None:
    told = account(journal())
    assert told["down"] == 100.0
    assert told["starting"] == 20.0
    assert told["repeated"] == 2.0
    assert told["skipped"] == 1.0
    assert told["saving"] == 0.5
    assert told["evaluating"] == 2.0
    assert told["compiling"] == 6.0  # 4 of the first process, 2 of the second
    assert told["productive"] == 4.0
    assert told["total"] == 135.5
    assert told["effective"] == pytest.approx(4.0 / 135.5)


def test_causes_add_up_to_the_total() -> None:
    told = account(journal())
    causes = sum(value for name, value in told.items() if name not in ("total", "effective"))
    assert causes == pytest.approx(told["total"])


def test_a_rollback_withdraws_its_steps() -> None:
    lines = [*journal(), {"event": "rollback", "time": 136.5, "step": 2, "seconds": 1.0}]
    told = account(lines)
    assert told["rolling back"] == 1.0
    assert told["repeated"] == 2.0 + 4.0
    assert told["productive"] + told["compiling"] == 6.0


def test_an_empty_journal_is_nothing() -> None:
    assert account([])["effective"] == 0.0
