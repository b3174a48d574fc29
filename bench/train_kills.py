"""HARM -> IS THE RUN UNHARMED? Kills, faulted saves, poisoned batches and SIGTERMs, many of each.

Every child is a fork of this process, in which nothing has started a thread: a run of 40 steps
takes about two seconds. Figures go to bench/results/train_kills.json.
"""

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.record import record
from tests.train.tiny import ALONE, options, tiny_run
from xverse.data.loader import Batch
from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.train.checkpoints import Checkpoints
from xverse.train.journal import last_steps, read_events
from xverse.train.manifest import published
from xverse.train.objective import Part, pretrain
from xverse.train.options import Keeping, Training, Updating, Watching
from xverse.train.stop import Stop

STOPPED = 75
LISTENS = "listens"  # a file that says so
TRAINING = options(
    steps=40,
    keep=Keeping(save_every=3, evaluate_every=5, evaluate_rows=4, keep=2),
    update=Updating(warmup_steps=4, learning_rate=3e-3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--poisoned", type=int, default=20)
    parser.add_argument("--terms", type=int, default=100)
    asked = parser.parse_args()
    random.seed(20261121)
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        began = time.monotonic()
        child(train, home / "clean").wait()
        seconds = time.monotonic() - began
        clean = result(home / "clean")
        figures["clean_run_s"] = round(seconds, 2)
        stages: dict[str, Callable[[], dict[str, object]]] = {
            "faulted_saves": lambda: faults(home, asked.faults),
            "poisoned": lambda: poisoned(home, asked.poisoned),
            "kills": lambda: kills(home, asked.kills, seconds, clean),
            "sigterms": lambda: terms(home, asked.terms, seconds, clean),
        }
        for name, stage in stages.items():
            figures[name] = stage()
            print(json.dumps({name: figures[name]}), flush=True)
    print(record("train_kills", figures, packages=("safetensors",)))


def train(folder: Path, training: Training = TRAINING, objective: object = pretrain) -> int:
    """Train in `folder`, or go on there; what a process that did so would exit with."""
    with Stop() as stop:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LISTENS).touch()
        run = tiny_run(folder, training, objective=objective, validation=True)  # type: ignore[arg-type]
        outcome = run.run(stop)
    run.journal.close()
    torch.save(run.optimizer.tensors(), folder / "weights.pt")
    return STOPPED if outcome == "stopped" else 0


class Child:
    """A fork of this process that does something and exits with what it gives."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> int:
        """Its exit code; of one that was killed, minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def signal(self, number: int) -> None:
        """It is a zombie at worst: only `wait` gives its number back."""
        os.kill(self.pid, number)


def child(work: Callable[..., int], *given: object) -> Child:
    pid = os.fork()
    if pid:
        return Child(pid)
    code = 1
    try:
        code = work(*given)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def result(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, and everything the optimizer holds at the end."""
    losses = [facts["loss"] for facts in last_steps(read_events(folder / "metrics.jsonl"))]
    return losses, torch.load(folder / "weights.pt", weights_only=True)


def same(
    one: tuple[list[float], dict[str, torch.Tensor]],
    other: tuple[list[float], dict[str, torch.Tensor]],
) -> bool:
    """Bit for bit."""
    return one[0] == other[0] and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def kills(
    home: Path, wanted: int, seconds: float, clean: tuple[list[float], dict[str, torch.Tensor]]
) -> dict[str, object]:
    """kill -9 at random moments of runs, five a run, which then go on to their end."""
    done = identical = runs = during_save = 0
    while done < wanted:
        folder = home / f"killed-{runs}"
        left = min(5, wanted - done)
        while left:
            victim = child(train, folder)
            time.sleep(random.uniform(0, seconds))
            victim.signal(signal.SIGKILL)
            if victim.wait() != -signal.SIGKILL:
                break  # it was faster
            during_save += any((folder / "checkpoints").glob(".step-*"))
            done, left = done + 1, left - 1
        assert child(train, folder).wait() == 0
        runs += 1
        identical += same(result(folder), clean)
        shutil.rmtree(folder)
    return {
        "kills": done,
        "of_them_during_a_save": during_save,
        "runs": runs,
        "runs_bit_identical": identical,
    }


def terms(
    home: Path, wanted: int, seconds: float, clean: tuple[list[float], dict[str, torch.Tensor]]
) -> dict[str, object]:
    """SIGTERM at random moments: the run is saved within a step, and goes on to the same end."""
    done = saved = identical = runs = 0
    folder = home / "ended"
    while done < wanted:
        (folder / LISTENS).unlink(missing_ok=True)
        victim = child(train, folder)
        while not (folder / LISTENS).exists():  # the verb listens before it does anything else
            time.sleep(0.001)
        time.sleep(random.uniform(0, seconds))
        victim.signal(signal.SIGTERM)
        code = victim.wait()
        if code == STOPPED:
            done += 1
            steps = last_steps(read_events(folder / "metrics.jsonl"))
            newest = published(folder / "checkpoints")[-1][0] if steps else 0
            saved += newest == len(steps)
        else:
            assert code == 0, code
        if code == 0:
            runs, identical = runs + 1, identical + same(result(folder), clean)
            shutil.rmtree(folder)
    return {
        "sigterms": done,
        "saved_at_the_very_step": saved,
        "runs_to_the_end": runs,
        "runs_bit_identical": identical,
    }


def faults(home: Path, wanted: int) -> dict[str, object]:
    """A save of step 2 beside one of step 1 is hit at each of its writes in turn, by a kill, by a
    full disk, or cut off after some bytes; then the newest checkpoint that is whole is loaded."""
    events = count_events(home / "counted")
    kinds = ("kill", "full disk", "cut off")
    loaded = {1: 0, 2: 0}
    assert child(save, home / "before", 1).wait() == 0
    for number in range(wanted):
        folder = home / "faulted"
        shutil.copytree(home / "before", folder)
        kind = kinds[number % 3]
        place = number // 3 % events
        child(faulted, folder, kind, place, random.Random(number)).wait()
        loaded[child(recover, folder).wait()] += 1
        shutil.rmtree(folder)
    return {
        "faulted": wanted,
        "places": events,
        "loaded_the_one_before": loaded[1],
        "loaded_the_one_that_was_hit": loaded[2],
    }


def recover(folder: Path) -> int:
    """The step that is loaded; and the next save succeeds."""
    step = load(folder)
    save(folder, 3)
    assert load(folder) == 3
    return step


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"weight.{i}": torch.full((64, 64), float(step)) for i in range(4)}


def save(folder: Path, step: int) -> int:
    checkpoints = Checkpoints(folder, ALONE, keep=2)
    checkpoints.save(step, tensors(step), {"step": step})
    checkpoints.wait()
    return 0


def load(folder: Path) -> int:
    """The step that was loaded, all of whose tensors must be of that step."""
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors(0).items()}
    told = Checkpoints(folder, ALONE, keep=2).load(found)
    assert told is not None
    assert all((tensor == told.step).all() for tensor in found.values())
    assert told.facts == {"step": told.step}
    return told.step


def watch(folder: Path, act: Callable[[int], None]) -> None:
    """Call `act` with 0, 1, 2, ... at each change of the disk under `folder` that Python makes."""
    count = 0

    def on_event() -> None:
        nonlocal count
        count += 1
        act(count - 1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open")
        if changes and str(folder) in str(arguments[0]):
            on_event()

    real = os.fsync

    def fsync(handle: Any) -> None:
        on_event()
        real(handle)

    os.fsync = fsync  # type: ignore[assignment]  # its parameter has another name
    sys.addaudithook(hook)


def count_events(folder: Path) -> int:
    """Changes of the disk in a save, counted in a child since a hook cannot be taken off."""
    assert child(save, folder, 1).wait() == 0
    told = folder / "count"

    def work() -> int:
        found: list[int] = []
        watch(folder, found.append)
        save(folder, 2)
        told.write_text(str(len(found)))
        return 0

    assert child(work).wait() == 0
    return int(told.read_text())


def faulted(folder: Path, kind: str, place: int, chance: random.Random) -> int:
    def act(number: int) -> None:
        if number == place and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if number >= place and kind == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")

    if kind == "cut off":
        limit = chance.randrange(1, 70_000)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    else:
        watch(folder, act)
    try:
        save(folder, 2)
    except XverseError:
        return 0
    return 0


def poisoned(home: Path, wanted: int) -> dict[str, object]:
    """Batches of noise, and losses that are no numbers, in a run of 200 steps: three of five alone,
    the rest in a row, so that the run is rolled back once."""
    training = options(
        steps=200,
        update=Updating(warmup_steps=10, learning_rate=3e-3),
        keep=Keeping(save_every=20),
        watch=Watching(window=32, patience=5),
    )
    alone = wanted - 6
    chosen = set(random.sample(range(60, 140), alone)) | set(range(150, 156))

    def harm(decoder: Decoder, batch: Batch, units: int) -> Part:
        harm.passes += 1  # type: ignore[attr-defined]
        step = (harm.passes - 1) // 2  # type: ignore[attr-defined]
        part = pretrain(decoder, batch, units)
        if step not in chosen:
            return part
        return Part(part.loss * (float("nan") if step % 2 else 40.0), part.also)

    harm.passes = 0  # type: ignore[attr-defined]
    for name, objective in (("calm", pretrain), ("harmed", harm)):
        assert child(train, home / name, training, objective).wait() == 0
    calm, harmed = (
        [facts["loss"] for facts in last_steps(read_events(home / name / "metrics.jsonl"))]
        for name in ("calm", "harmed")
    )
    events = list(read_events(home / "harmed" / "metrics.jsonl"))
    noise = torch.tensor(calm[-20:]).std().item()
    return {
        "poisoned": len(chosen),
        "skipped": sum(event["event"] == "bad" for event in events),
        "rollbacks": sum(event["event"] == "rollback" for event in events),
        "mean_loss_of_the_last_20_steps": {
            "clean": sum(calm[-20:]) / 20,
            "poisoned": sum(harmed[-20:]) / 20,
            "deviation_in_the_clean_run": noise,
        },
    }


if __name__ == "__main__":
    main()
