"""LOSS, NORM -> VERDICT. Whether a step may change the weights, and when to go back."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from xverse.errors import XverseError
from xverse.train.options import Watching

SLACK = 0.05  # nats: losses that hardly move have next to no deviation, and are no spikes

Act = Literal["update", "skip", "roll back"]


@dataclass(frozen=True)
class Verdict:
    """What to do with a step, and why if not simply to update."""

    act: Act
    why: str = ""


class Watchdog:
    """Judges each step by its loss and the norm of its gradient, which all ranks agree on."""

    def __init__(self, options: Watching) -> None:
        self.options = options
        self._losses: deque[float] = deque(maxlen=options.window)
        self._bad = 0  # in a row
        self._rollbacks: dict[int, int] = {}

    def judge(self, loss: float, norm: float) -> Verdict:
        """Of a step that has been computed and not yet applied."""
        why = self._fault(loss, norm)
        if not why:
            self._bad = 0
            self._losses.append(loss)
            return Verdict("update")
        self._bad += 1
        if self._bad < self.options.patience:
            return Verdict("skip", why)
        self._bad = 0
        return Verdict("roll back", f"{why}; the {self.options.patience}th bad step in a row")

    def rolled_back(self, step: int) -> None:
        """Note that checkpoint `step` was taken. XverseError where it helps no more."""
        self._rollbacks[step] = self._rollbacks.get(step, 0) + 1
        if self._rollbacks[step] > self.options.rollbacks:
            raise XverseError(
                f"The run does not get past step {step}.",
                f"It was rolled back to its checkpoint {self.options.rollbacks} times, and each "
                f"time {self.options.patience} bad steps in a row followed.",
                "Lower the learning rate, or look at the data; metrics.jsonl has every bad step.",
            )

    def to_json(self) -> dict[str, object]:
        """What a checkpoint keeps, so that a run that goes on judges as one that never stopped."""
        rollbacks = {str(step): count for step, count in self._rollbacks.items()}
        return {"losses": list(self._losses), "bad": self._bad, "rollbacks": rollbacks}

    def restore(self, found: object, *, rollbacks: bool = True) -> None:
        """As `to_json` gave it; without `rollbacks`, those counted since are kept."""
        assert isinstance(found, dict)
        self._losses = deque(found["losses"], maxlen=self.options.window)
        self._bad = found["bad"]
        if rollbacks:
            self._rollbacks = {int(step): n for step, n in found["rollbacks"].items()}

    def _fault(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}"
        if not self.options.spike or len(self._losses) < max(2, self.options.window // 2):
            return ""
        mean = sum(self._losses) / len(self._losses)
        variance = sum((one - mean) ** 2 for one in self._losses) / len(self._losses)
        most = mean + self.options.spike * math.sqrt(variance) + SLACK
        if loss > most:
            return f"the loss is {loss:.4f}, and {most:.4f} would be a spike after {mean:.4f}"
        return ""
