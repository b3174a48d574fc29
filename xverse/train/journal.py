"""WHAT HAPPENS -> METRICS. metrics.jsonl, the line on the terminal, TensorBoard, and the plots."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from xverse.errors import XverseError
from xverse.files import parse_json
from xverse.log import logger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"

Listener = Callable[[Mapping[str, Any]], None]  # told every event, with its name and its time


class Journal:
    """What rank 0 writes down of a run; the other ranks have a silent one, without a folder."""

    def __init__(
        self,
        folder: Path | None,
        *,
        tensorboard: bool = False,
        terminal: TextIO | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.folder, self._terminal, self._listener = folder, terminal, listener
        self._file: TextIO | None = None
        self._board = _board(folder) if folder is not None and tensorboard else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _mend(folder / METRICS)
            self._file = (folder / METRICS).open("a", encoding="utf-8")

    def note(self, event: str, **facts: Any) -> None:
        """Write an event with the time of now; numbers that JSON lacks become their names."""
        if self._file is None:
            return
        line = {"event": event, "time": time.time()} | {k: _plain(v) for k, v in facts.items()}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._listener is not None:
            self._listener(line)
        if self._board is not None and "step" in facts:
            for name, value in facts.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    self._board.add_scalar(f"{event}/{name}", value, facts["step"])

    def say(self, line: str) -> None:
        """A line for people."""
        if self._terminal is not None:
            print(line, file=self._terminal, flush=True)

    def events(self) -> Iterator[dict[str, Any]]:
        """All that was written down so far, by earlier processes too."""
        return read_events(self.folder / METRICS) if self.folder is not None else iter(())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def progress_line(facts: Mapping[str, Any], steps: int) -> str:
    """A step as people read it, with the time that is left."""
    speed = f"{facts['tokens_per_second']:,.0f} tok/s"
    if facts.get("mfu") is not None:
        speed += f", MFU {facts['mfu']:.1%} strict, {facts['mfu_palm']:.1%} by PaLM's formula"
    left = int((steps - facts["step"] - 1) * facts["pace"])
    clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    return (
        f"step {facts['step'] + 1}/{steps}  loss {facts['loss']:.4f}  norm {facts['norm']:.2f}  "
        f"rate {facts['rate']:.2e}  {speed}  left {clock}"
    )


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line that was cut off is left out; any other that is no
    JSON raises XverseError."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield parse_json(line)
        except ValueError as error:
            raise XverseError(
                f"{path}, line {number} is not what a run writes.",
                str(error),
                "Restore the file, or move it away: the run goes on without its past.",
            ) from error


def last_steps(events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps as the run has them now: of a step that was repeated, the latest."""
    steps: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "step":
            steps[event["step"]] = event
        elif event["event"] in ("ready", "rollback"):
            steps = {step: facts for step, facts in steps.items() if step < event["step"]}
    return [steps[step] for step in sorted(steps)]


def plot(steps: list[dict[str, Any]], path: Path) -> None:
    """Loss, throughput and MFU over the steps, as one PNG; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logger.warning("no plot: matplotlib is not installed; pip install 'xverse-llm[train]'")
        return
    panels = [("loss", "loss, nats a token"), ("tokens_per_second", "tokens a second")]
    if any(facts.get("mfu") is not None for facts in steps):
        panels.append(("mfu", "MFU, strict formula"))
    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (name, title) in zip(axes, panels, strict=True):
        points = [(f["step"] + 1, f[name]) for f in steps if isinstance(f.get(name), float)]
        axis.plot(*zip(*points, strict=True)) if points else None
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)


def _mend(path: Path) -> None:
    """Take off a last line that a killed process could not finish."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value


def _board(folder: Path) -> "SummaryWriter":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise XverseError(
            "TensorBoard's files cannot be written.",
            f"{error.name} is not installed.",
            "pip install 'xverse-llm[train]', or leave --keep.tensorboard out.",
        ) from error
    return SummaryWriter(str(folder / "tensorboard"))
