"""The loop: a run that was stopped, killed or poisoned ends as the one that never was."""

import multiprocessing
import multiprocessing.context
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.train.tiny import Documents, options, tiny_decoder, tiny_run
from xverse.data.loader import Batch
from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.train.account import account
from xverse.train.journal import last_steps, read_events
from xverse.train.loop import Run
from xverse.train.manifest import published
from xverse.train.objective import Objective, Part, pretrain
from xverse.train.options import Keeping, Updating, Watching
from xverse.train.stop import Stop


def losses(folder: Path) -> list[float]:
    return [facts["loss"] for facts in last_steps(read_events(folder / "metrics.jsonl"))]


def events(folder: Path, name: str) -> list[dict[str, object]]:
    return [e for e in read_events(folder / "metrics.jsonl") if e["event"] == name]


def at_pass(number: int, act: Callable[[Part], Part]) -> Objective:
    """`pretrain`, and `act` on what it gives in one pass, counted from 1; two passes are a step."""
    count = 0

    def objective(decoder: Decoder, batch: Batch, units: int) -> Part:
        nonlocal count
        count += torch.is_grad_enabled()
        part = pretrain(decoder, batch, units)
        return act(part) if count == number and torch.is_grad_enabled() else part

    return objective


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final state of a run of 12 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    run = tiny_run(folder, validation=True)
    assert run.run(Stop()) == "done"
    return losses(folder), {name: t.clone() for name, t in run.optimizer.tensors().items()}


def assert_same(folder: Path, run: Run, clean: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert losses(folder) == clean[0]
    now = run.optimizer.tensors()
    assert all(torch.equal(now[name], tensor) for name, tensor in clean[1].items())


def test_a_run_learns(clean: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert clean[0][0] > 4.1  # ln 64
    assert clean[0][-1] < 3.8


def die(folder: Path, step: int) -> None:
    """Train, and be killed in the second pass of a step, a save perhaps on its way."""

    def kill(part: Part) -> Part:
        os.kill(os.getpid(), signal.SIGKILL)
        return part

    torch.set_num_threads(1)
    tiny_run(folder, objective=at_pass(2 * step, kill), validation=True).run(Stop())


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Forks of a process that has imported all and started nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_loop"])
    return context


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_process_that_dies_is_gone_on_from_bit_for_bit(
    tmp_path: Path,
    clean: tuple[list[float], dict[str, torch.Tensor]],
    processes: multiprocessing.context.ForkServerContext,
    step: int,
) -> None:
    child = processes.Process(target=die, args=(tmp_path, step))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    run = tiny_run(tmp_path, validation=True)
    assert run.run(Stop()) == "done"
    assert_same(tmp_path, run, clean)
    assert len(events(tmp_path, "start")) == 2


def ask(stop: Stop, part: Part) -> Part:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked == "SIGTERM"
    return part


@pytest.mark.parametrize("step", [1, 4, 7])
def test_sigterm_saves_the_step_it_came_in(
    tmp_path: Path, clean: tuple[list[float], dict[str, torch.Tensor]], step: int
) -> None:
    with Stop() as stop:
        run = tiny_run(tmp_path, objective=at_pass(2 * step - 1, lambda part: ask(stop, part)))
        assert run.run(stop) == "stopped"
    assert published(tmp_path / "checkpoints")[-1][0] == step == len(losses(tmp_path))
    again = tiny_run(tmp_path, validation=True)
    assert again.run(Stop()) == "done"
    assert_same(tmp_path, again, clean)


def test_sigterm_during_the_evaluation_or_before_the_first_step(tmp_path: Path) -> None:
    training = options(keep=Keeping(save_every=50, evaluate_every=3))
    stop = Stop()

    def objective(decoder: Decoder, batch: Batch, units: int) -> Part:
        if not torch.is_grad_enabled():
            stop.ask("SIGTERM")
        return pretrain(decoder, batch, units)

    run = tiny_run(tmp_path, training, objective=objective, validation=True)
    assert run.run(stop) == "stopped"
    assert published(tmp_path / "checkpoints")[-1][0] == 3
    early = Stop()
    early.ask("SIGTERM")
    assert tiny_run(tmp_path, training).run(early) == "stopped"
    assert len(losses(tmp_path)) == 3


@pytest.mark.parametrize("harm", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_told(tmp_path: Path, harm: float) -> None:
    run = tiny_run(tmp_path, objective=at_pass(9, lambda p: Part(p.loss * harm, p.also)))
    assert run.run(Stop()) == "done"
    (bad,) = events(tmp_path, "bad")
    assert bad["step"] == 4
    assert "the loss is" in str(bad["why"])
    assert len(losses(tmp_path)) == 12
    assert all(torch.isfinite(tensor).all() for tensor in run.optimizer.tensors().values())
    assert run.position.row or run.position.window or run.position.epoch


def test_bad_steps_in_a_row_go_back_to_the_checkpoint_and_pass_by(tmp_path: Path) -> None:
    count = 0

    def objective(decoder: Decoder, batch: Batch, units: int) -> Part:
        nonlocal count
        count += 1
        part = pretrain(decoder, batch, units)
        return Part(part.loss * float("nan"), {}) if 13 <= count <= 18 else part  # steps 7 to 9

    training = options(watch=Watching(patience=3), keep=Keeping(save_every=4))
    run = tiny_run(tmp_path, training, objective=objective)
    assert run.run(Stop()) == "done"
    assert [event["step"] for event in events(tmp_path, "rollback")] == [4]
    assert len(events(tmp_path, "bad")) == 3
    assert len(losses(tmp_path)) == 12
    told = account(read_events(tmp_path / "metrics.jsonl"))
    assert told["repeated"] > 0
    assert told["skipped"] > 0


def test_a_run_that_cannot_get_past_a_step_ends(tmp_path: Path) -> None:
    def objective(decoder: Decoder, batch: Batch, units: int) -> Part:
        part = pretrain(decoder, batch, units)
        return Part(part.loss * float("nan"), {})

    training = options(watch=Watching(patience=2, rollbacks=2))
    with pytest.raises(XverseError, match="no checkpoint yet"):
        tiny_run(tmp_path, training, objective=objective).run(Stop())
    tiny_run(tmp_path / "begun", options(steps=4)).run(Stop())
    training = options(steps=8, watch=Watching(patience=2, rollbacks=2))
    with pytest.raises(XverseError, match="does not get past step 4"):
        tiny_run(tmp_path / "begun", training, objective=objective).run(Stop())


def test_a_save_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync
    failing = True

    def fsync(handle: int) -> None:
        if failing:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    def objective(decoder: Decoder, batch: Batch, units: int) -> Part:
        nonlocal failing
        failing = len(losses(tmp_path)) < 9  # the disk has room again from step 9 on
        return pretrain(decoder, batch, units)

    run = tiny_run(tmp_path, objective=objective)
    assert run.run(Stop()) == "done"
    assert events(tmp_path, "save failed")
    assert published(tmp_path / "checkpoints")[-1][0] == 12


def test_other_options_are_refused_and_more_steps_are_not(tmp_path: Path) -> None:
    tiny_run(tmp_path, options(steps=4)).run(Stop())
    with pytest.raises(XverseError, match="other options"):
        tiny_run(tmp_path, options(seed=3)).run(Stop())
    with pytest.raises(XverseError, match="other options"):
        tiny_run(tmp_path, options(update=Updating(optimizer="muon"))).run(Stop())
    run = tiny_run(tmp_path, options(steps=6))
    assert run.run(Stop()) == "done"
    assert run.step == 6


def test_accumulation_is_the_same_as_one_pass(tmp_path: Path) -> None:
    for rows in (1, 2, 4):
        training = options(rows_per_pass=rows, steps=4)
        tiny_run(tmp_path / str(rows), training, documents=Documents()).run(Stop())
    one, two, four = (losses(tmp_path / str(rows)) for rows in (1, 2, 4))
    assert one == pytest.approx(four, abs=1e-5)
    assert two == pytest.approx(four, abs=1e-5)


def test_documents_in_a_row_do_not_see_each_other() -> None:
    """The loss of a batch is that of its documents, each alone."""
    from itertools import islice

    from tests.data.test_loader import make
    from xverse.data.loader import Position

    (step,) = islice(make().steps(Position()), 1)
    batch, decoder = step.passes[0], tiny_decoder()
    together = pretrain(decoder, batch, 1).loss.item()
    alone, start = 0.0, 0
    for length in batch.documents:
        here = slice(start, start + length)
        parts = (batch.ids, batch.targets, batch.mask, batch.positions)
        one = Batch(*(part[here] for part in parts), documents=(length,))
        alone += pretrain(decoder, one, 1).loss.item()
        start += length
    assert together == pytest.approx(alone, rel=1e-5)


def test_what_a_save_reads_is_changed_by_updates_alone_and_after_it_was_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a save still copies when the next step begins."""
    run = tiny_run(tmp_path, options(keep=Keeping(save_every=3)))
    told: list[str] = []
    before: dict[str, torch.Tensor] = {}
    save, hold, update = run.checkpoints.save, run.checkpoints.hold, run.optimizer.update

    def saved(step: int, tensors: dict[str, torch.Tensor], facts: dict[str, object]) -> None:
        told.append("save")
        before.update({name: tensor.clone() for name, tensor in tensors.items()})
        save(step, tensors, facts)

    def held() -> None:
        told.append("hold")
        now = run.optimizer.tensors()
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
        before.clear()
        hold()

    def updated(number: int, rate: float, scale: float) -> None:
        told.append("update")
        update(number, rate, scale)

    monkeypatch.setattr(run.checkpoints, "save", saved)
    monkeypatch.setattr(run.checkpoints, "hold", held)
    monkeypatch.setattr(run.optimizer, "update", updated)
    assert run.run(Stop()) == "done"
    assert told == (["hold", "update"] * 3 + ["save"]) * 4
