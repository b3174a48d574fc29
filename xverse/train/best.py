"""EVALUATIONS -> THE BEST. Which step had the least held-out loss, and whether to go on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Best:
    """The best evaluation so far."""

    step: int = -1  # none yet
    loss: float = math.inf
    since: int = 0  # evaluations in a row that were no better

    def see(self, step: int, loss: float) -> bool:
        """Whether this evaluation is the best so far; a loss that is no number never is."""
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def to_json(self) -> dict[str, object]:
        """For the facts of a checkpoint; JSON has no infinity."""
        loss = self.loss if math.isfinite(self.loss) else None
        return {"step": self.step, "loss": loss, "since": self.since}

    @classmethod
    def from_json(cls, facts: Mapping[str, object]) -> "Best":
        """What `to_json` gave."""
        step, loss, since = facts["step"], facts["loss"], facts["since"]
        assert isinstance(step, int)
        assert isinstance(since, int)
        return cls(step, loss if isinstance(loss, float) else math.inf, since)
