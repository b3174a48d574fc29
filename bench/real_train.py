"""SHARDS -> A RUN THAT IS INTERRUPTED. `xverse pretrain` as users call it, ended and begun again.

The first call kills the run with SIGKILL once, and every call ends by SIGTERM when its time is up.
How many steps the whole run has follows from the pace that was measured.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from xverse.files import read_json, write_json
from xverse.train.journal import METRICS, last_steps, read_events
from xverse.train.options import Keeping, Training, Updating

ROOT = Path(__file__).resolve().parents[1]
MODEL, STATE = "model", "state.json"
LEAVING = 20.0  # seconds that the last save of a call may take
STARTING = 30.0  # seconds from the start of a process to its first step, as planned for
FIRST_PLAN = 1_000_000  # steps, before a pace is known: the rate stays where it is until replanned
DECAY = 0.2
SURE = 0.95  # of the time that is left is planned for: the pace will not be the same


@dataclass(frozen=True)
class Scale:
    """How large the run is."""

    shape: str
    training: Training
    kill_after: float  # seconds of the first call
    least_steps: int  # that a pace is taken from


def scale(small: bool) -> Scale:
    """About 110M parameters beside the input embedding; small: what a CPU does in a minute."""
    every = 20 if small else 400
    return Scale(
        "from-depth:2" if small else "from-depth:12",
        Training(
            steps=FIRST_PLAN,
            row_tokens=128 if small else 2048,
            rows_per_step=8 if small else 64,
            rows_per_pass=4 if small else 32,
            update=Updating(
                learning_rate=1e-3,
                schedule="wsd",
                warmup_steps=10 if small else 300,
                decay_share=DECAY,
            ),
            keep=Keeping(
                save_every=every // 2,
                evaluate_every=every,
                evaluate_rows=8 if small else 0,
                log_every=every // 10,
            ),
        ),
        kill_after=8.0 if small else 150.0,
        least_steps=20 if small else 100,
    )


def train(shards: Path, folder: Path, *, seconds: float, total: float, small: bool) -> str:
    """One call: train for `seconds` of a run of `total` seconds over all calls. How it ended."""
    began = time.monotonic()
    state = State.read(folder / STATE)
    with state.call(seconds):
        while True:
            left = seconds - (time.monotonic() - began)
            if left < LEAVING + STARTING and not small:
                return "stopped"
            state.plan(folder, scale(small), total)
            kill = scale(small).kill_after if not state.kills else None
            ended = _process(shards, folder, state, left, kill, small)
            state.note(ended)
            if ended != "killed":
                return ended


class State:
    """What is known from one call to the next: kept in a file after every change."""

    def __init__(self, file: Path, facts: dict[str, Any]) -> None:
        self.file, self.facts = file, facts

    @classmethod
    def read(cls, file: Path) -> "State":
        empty: dict[str, Any] = {"calls": [], "ended": [], "steps": FIRST_PLAN}
        return cls(file, read_json(file) if file.exists() else empty)

    @property
    def kills(self) -> int:
        return int(self.facts["ended"].count("killed"))

    @property
    def spent(self) -> float:
        """Seconds of all calls, the present one too."""
        return sum(call.get("ended", time.time()) - call["began"] for call in self.facts["calls"])

    @contextmanager
    def call(self, seconds: float) -> Iterator[None]:
        self.facts["calls"].append({"began": time.time(), "seconds": seconds})
        self._write()
        try:
            yield
        finally:
            self.facts["calls"][-1]["ended"] = time.time()
            self._write()

    def note(self, ended: str) -> None:
        self.facts["ended"].append(ended)
        self._write()

    def plan(self, folder: Path, size: Scale, total: float) -> None:
        """Steps that end when the time does; unchanged where the decay has begun."""
        steps = last_steps(read_events(folder / MODEL / "run" / METRICS))
        planned = self.facts["steps"]
        if len(steps) < size.least_steps or len(steps) > (1 - DECAY) * planned:
            return
        latest = steps[-1000:]
        gaps = [later["time"] - one["time"] for one, later in pairwise(latest)]
        usual = sorted(gaps)[len(gaps) // 2]
        # Evaluations and saves count, starts and pauses between calls do not.
        pace = sum(min(gap, 40 * usual) for gap in gaps) / len(gaps)
        left = total - self.spent - STARTING - LEAVING
        self.facts["steps"] = max(len(steps) + 2, len(steps) + int(SURE * left / pace))
        self._write()
        print(f"{pace * 1e3:.1f} ms a step: {self.facts['steps']:,} steps in all", flush=True)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self.facts)


def _process(
    shards: Path, folder: Path, state: State, left: float, kill: float | None, small: bool
) -> str:
    """One process of the verb: "done", "stopped" by SIGTERM, or "killed"."""
    began = time.monotonic()
    config = folder / "run.toml"
    config.write_text(toml_of(scale(small), state.facts["steps"]), "utf-8")
    command = [sys.executable, "-m", "xverse", "pretrain", str(shards)]
    command += ["--out", str(folder / MODEL), "--config", str(config)]
    command += ["--device", "cpu"] if small else []
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ":".join(paths)}) as process:
        asked = False
        while process.poll() is None:
            time.sleep(0.2)
            passed = time.monotonic() - began
            if kill is not None and passed > kill and _may_be_killed(folder, scale(small)):
                process.kill()
                process.wait()
                return "killed"
            if passed > left - LEAVING and not asked:
                process.send_signal(signal.SIGTERM)
                asked = True
    if process.returncode in (0, 75):
        return "done" if process.returncode == 0 else "stopped"
    raise SystemExit(f"xverse pretrain ended with {process.returncode}")


def _may_be_killed(folder: Path, size: Scale) -> bool:
    """Whether there is a checkpoint to go on from, and some steps that will be lost with it."""
    events = list(read_events(folder / MODEL / "run" / METRICS))
    saved = [event["step"] for event in events if event["event"] == "save"]
    steps = [event["step"] for event in events if event["event"] == "step"]
    behind = size.training.keep.save_every // 4
    return bool(saved) and len(steps) >= size.least_steps and steps[-1] - saved[-1] >= behind


def toml_of(size: Scale, steps: int) -> str:
    """The run as a file for --config."""
    facts = asdict(size.training) | {"steps": steps}
    lines = [f'shape = "{size.shape}"']
    names = ("steps", "row_tokens", "rows_per_step", "rows_per_pass", "seed")
    lines += [f"{name} = {facts[name]}" for name in names]
    for table in ("update", "keep"):
        lines += ["", f"[{table}]"]
        lines += [f"{key} = {_word(value)}" for key, value in facts[table].items()]
    return "\n".join(lines) + "\n"


def _word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
