"""WHAT HAPPENS -> TRAINER FILES. A run in the words that scripts of LLaMA-Factory users read."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from xverse.errors import XverseError
from xverse.files import parse_json, write_json

LOG, STATE = "trainer_log.jsonl", "trainer_state.json"


class TrainerLog:
    """Listens to a run's journal; gives `trainer_log.jsonl` at once and the rest at its end."""

    def __init__(
        self, folder: Path, *, steps: int, steps_per_epoch: float, every: int, rows_per_step: int
    ) -> None:
        """`every`: steps between lines, whose loss is the mean since the line before."""
        self.folder, self.steps, self.per_epoch = folder, steps, steps_per_epoch
        self.every, self.rows_per_step = every, rows_per_step
        self.history: list[dict[str, Any]] = []  # as trainer_state.json has it
        self.losses: dict[int, float] = {}
        self.best: dict[str, Any] = {}
        self.began = self.first = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of the journal."""
        match event["event"]:
            case "start":
                self.began = event["time"]
                self.folder.mkdir(parents=True, exist_ok=True)
                self._restore()
            case "ready" | "rollback":
                self.first = event["step"]
                self._forget(event["step"])
            case "step":
                self._step(event)
            case "evaluate":
                self._evaluated(event)
            case "best":
                self.best = dict(event)

    def finish(self) -> None:
        """Write the files of a run that is over: its state, its results, its plots."""
        elapsed = self._elapsed(self.history[-1]) if self.history else 0.0
        made = max(self.losses, default=0)
        epoch = made / self.per_epoch
        state = {
            "best_metric": self.best.get("loss"),
            "best_global_step": self.best.get("step"),
            "epoch": epoch,
            "global_step": made,
            "max_steps": self.steps,
            "num_train_epochs": round(self.steps / self.per_epoch, 6),
            "logging_steps": self.every,
            "log_history": [
                {key: value for key, value in entry.items() if key != "time"}
                for entry in self.history
            ],
        }
        write_json(self.folder / STATE, state)
        results: dict[str, object] = {
            "epoch": epoch,
            "train_loss": sum(self.losses.values()) / max(1, len(self.losses)),
            "train_runtime": elapsed,
            "train_samples_per_second": self._done() * self.rows_per_step / max(elapsed, 1e-9),
            "train_steps_per_second": self._done() / max(elapsed, 1e-9),
        }
        write_json(self.folder / "train_results.json", results)
        evaluated = [entry for entry in self.history if "eval_loss" in entry]
        last = {"eval_loss": evaluated[-1]["eval_loss"]} if evaluated else {}
        write_json(self.folder / "all_results.json", results | last)

    def plot(self) -> None:
        """training_loss.png, and training_eval_loss.png where anything was evaluated."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise XverseError(
                "The plots cannot be drawn.",
                "matplotlib is not installed.",
                "pip install 'xverse-llm[train]', or leave --plot_loss out.",
            ) from error

        for name in ("loss", "eval_loss"):
            points = [(entry["step"], entry[name]) for entry in self.history if name in entry]
            if not points:
                continue
            figure = Figure(figsize=(8, 4), layout="constrained")
            axis = figure.subplots()
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
            axis.set_xlabel("step")
            axis.set_ylabel(f"{name}, nats a token")
            axis.grid(alpha=0.3)
            figure.savefig(self.folder / f"training_{name}.png", dpi=120)

    def _step(self, event: Mapping[str, Any]) -> None:
        number = event["step"] + 1
        self.losses[number] = event["loss"]
        if number % self.every and number != self.steps:
            return
        first = (number - 1) // self.every * self.every
        recent = [self.losses[i] for i in range(first + 1, number + 1) if i in self.losses]
        entry = {
            "loss": sum(recent) / len(recent),
            "grad_norm": event["norm"],
            "learning_rate": event["rate"],
        }
        self._add(event, number, entry)

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        also = {k: v for k, v in event.items() if k.startswith("rewards.")}
        named = {f"eval_{key.replace('.', '/')}": value for key, value in also.items()}
        found = {"eval_loss": event["loss"], "eval_runtime": event["seconds"], **named}
        self._add(event, event["step"], found)

    def _add(self, event: Mapping[str, Any], step: int, entry: dict[str, Any]) -> None:
        self.history.append(
            {**entry, "epoch": step / self.per_epoch, "step": step, "time": event["time"]}
        )
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._line(self.history[-1])) + "\n")

    def _line(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The entry as trainer_log.jsonl has it; times count from this process's start."""
        step, elapsed = entry["step"], self._elapsed(entry)
        left = elapsed / max(1, step - self.first) * (self.steps - step)
        told = ("loss", "eval_loss", "grad_norm", "learning_rate")
        return {
            "current_steps": step,
            "total_steps": self.steps,
            **{key: entry[key] for key in told if key in entry},
            "epoch": round(entry["epoch"], 4),
            "percentage": round(100 * step / self.steps, 2),
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "remaining_time": str(timedelta(seconds=int(left))),
        }

    def _elapsed(self, entry: Mapping[str, Any]) -> float:
        return float(entry["time"] - self.began)

    def _done(self) -> int:
        """Steps that this process made."""
        return sum(step > self.first for step in self.losses)

    def _restore(self) -> None:
        """The lines of an earlier process of the same run; the files of a finished one go."""
        from xverse.train.journal import read_events

        (self.folder / STATE).unlink(missing_ok=True)
        for event in read_events(self.folder / "run" / "metrics.jsonl"):
            if event["event"] == "step":
                self.losses[event["step"] + 1] = event["loss"]
        if (self.folder / LOG).exists():
            lines = (self.folder / LOG).read_bytes().split(b"\n")[:-1]
            for line in map(parse_json, lines):
                step = line.pop("current_steps")
                kept = ("loss", "eval_loss", "grad_norm", "learning_rate", "epoch")
                entry = {key: line[key] for key in kept if key in line}
                self.history.append(entry | {"step": step, "time": self.began})

    def _forget(self, step: int) -> None:
        """Take out what happened after `step`, which the run makes again."""
        self.losses = {n: loss for n, loss in self.losses.items() if n <= step}
        self.history = [entry for entry in self.history if entry["step"] <= step]
        path = self.folder / LOG
        if path.exists():
            lines = path.read_bytes().split(b"\n")[:-1]
            kept = [line for line in lines if int(str(parse_json(line)["current_steps"])) <= step]
            path.write_bytes(b"".join(line + b"\n" for line in kept))
