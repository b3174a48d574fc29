"""Options and schedule: what cannot be is refused by name, and rates are what their names say."""

from itertools import pairwise
from pathlib import Path

import pytest

from xverse.config import parse
from xverse.errors import XverseError
from xverse.train.options import Computing, Training, Updating
from xverse.train.schedule import learning_rate
from xverse.verbs.pretrain import Config


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Training(steps=0),
        lambda: Training(steps="many"),
        lambda: Training(update=Updating(beta2=1.0)),
        lambda: Training(update=Updating(learning_rate=-1)),
        lambda: Training(update=Updating(lowest_share=float("nan"))),
        lambda: Training(compute=Computing(dtype="float32"), update=Updating(master="none")),
    ],
)
def test_what_cannot_be_is_refused(bad: type[Training]) -> None:
    with pytest.raises(XverseError, match="cannot be"):
        bad()


def read(tmp_path: Path, text: str, *flags: str) -> Config:
    file = tmp_path / "run.toml"
    file.write_text(text)
    args = ["shards", "--out", "o", "--config", str(file), *flags]
    return parse(Config, args, prog="xverse pretrain", description="")


def test_tables_of_a_toml_are_groups_of_options(tmp_path: Path) -> None:
    text = 'steps = 7\n[update]\noptimizer = "muon"\n[mesh]\ndata = 2\n'
    config = read(tmp_path, text, "--update.clip", "0.5")
    assert (config.steps, config.mesh.data) == (7, 2)
    assert (config.update.optimizer, config.update.clip) == ("muon", 0.5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[mesh]\ntensors = 2\n", "'mesh.tensors'. Did you mean 'tensor'"),
        ("mesh = 4\n", "'mesh' is a table"),
        ("[update]\nbeta1 = 7\n", "beta1 = 7"),
        ("stepps = 4\n", "'stepps'"),
    ],
)
def test_a_toml_that_says_something_else_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(XverseError, match=why.replace(".", r"\.")):
        read(tmp_path, text)


def rates(**changes: object) -> list[float]:
    options = Updating(**({"learning_rate": 1.0, "warmup_steps": 10} | changes))  # type: ignore[arg-type]
    return [learning_rate(step, 100, options) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warm_up_is_linear_and_reaches_the_rate(schedule: str) -> None:
    assert rates(schedule=schedule)[:10] == pytest.approx([0.1 * n for n in range(1, 11)])


def test_schedules_end_where_they_should() -> None:
    cosine, wsd, constant = (rates(schedule=name) for name in ("cosine", "wsd", "constant"))
    assert cosine[-1] == pytest.approx(0.1)
    assert cosine[54] == pytest.approx(0.55)  # half way
    assert all(one >= other for one, other in pairwise(cosine[9:]))
    assert set(wsd[10:80]) == {1.0}
    assert wsd[89] == pytest.approx(0.55)
    assert wsd[-1] == pytest.approx(0.1)
    assert set(constant[10:]) == {1.0}
    assert rates(schedule="wsd", warmup_steps=0, decay_share=0.0)[-2] == 1.0
