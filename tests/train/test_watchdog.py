"""The watchdog: what is a bad step, and what it remembers over a resume."""

import json
import math
import random

import pytest

from xverse.errors import XverseError
from xverse.train.options import Watching
from xverse.train.watchdog import Watchdog


def fed(watchdog: Watchdog, count: int = 64, mean: float = 3.0) -> Watchdog:
    chance = random.Random(1)
    for _ in range(count):
        assert watchdog.judge(chance.gauss(mean, 0.1), 1.0).act == "update"
    return watchdog


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)]
)
def test_what_is_no_number_is_bad_from_the_first_step(loss: float, norm: float) -> None:
    verdict = Watchdog(Watching()).judge(loss, norm)
    assert verdict.act == "skip"
    assert "nan" in verdict.why or "inf" in verdict.why


def test_a_spike_is_bad_once_there_is_something_to_compare_with() -> None:
    assert Watchdog(Watching()).judge(50.0, 1.0).act == "update"
    watchdog = fed(Watchdog(Watching()))
    assert watchdog.judge(3.5, 1.0).act == "update"
    assert watchdog.judge(4.5, 1.0).act == "skip"
    assert watchdog.judge(0.5, 1.0).act == "update"  # better than ever is not bad
    assert fed(Watchdog(Watching(spike=0))).judge(50.0, 1.0).act == "update"


def test_bad_steps_in_a_row_roll_back_and_good_ones_forgive() -> None:
    watchdog = Watchdog(Watching(patience=3))
    acts = [watchdog.judge(x, 1.0).act for x in (math.nan, math.nan, 1.0, *[math.nan] * 3)]
    assert acts == ["skip", "skip", "update", "skip", "skip", "roll back"]


def test_it_gives_up_on_a_checkpoint_that_does_not_help() -> None:
    watchdog = Watchdog(Watching(rollbacks=2))
    watchdog.rolled_back(100)
    watchdog.rolled_back(100)
    watchdog.rolled_back(200)
    with pytest.raises(XverseError, match="does not get past step 100"):
        watchdog.rolled_back(100)


def test_it_judges_after_a_resume_as_without_one() -> None:
    watchdog = fed(Watchdog(Watching(patience=2)))
    watchdog.judge(math.nan, 1.0)
    again = Watchdog(Watching(patience=2))
    again.restore(json.loads(json.dumps(watchdog.to_json())))
    for loss in (4.5, 3.1, 4.5, 4.5):
        assert again.judge(loss, 1.0) == watchdog.judge(loss, 1.0)
