"""DECODER, DATA -> A RUN ON DISK. What pre-training and fine-tuning share: folder, journal."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from xverse.data.loader import Loader
from xverse.model.decoder import Decoder
from xverse.parallel.ranks import Ranks
from xverse.train import randomness
from xverse.train.account import account
from xverse.train.checkpoints import Checkpoints
from xverse.train.evaluate import Held
from xverse.train.journal import Journal, Listener, last_steps, plot
from xverse.train.loop import Outcome, Run
from xverse.train.objective import Objective
from xverse.train.options import Training
from xverse.train.stop import Stop

RUN = "run"  # the folder inside the model's that holds checkpoints and metrics


class TrainingRun:
    """A run in the folder of the model that comes of it."""

    def __init__(
        self,
        out: Path,
        options: Training,
        ranks: Ranks,
        *,
        record: Mapping[str, object],
        quiet: bool = False,
        listener: Listener | None = None,
    ) -> None:
        """`record` is written beside what the run makes, one more line for each call; `quiet`
        prints no progress. The generators are seeded: what is random comes after this."""
        self.out, self.options, self.ranks = out, options, ranks
        folder = out / RUN
        self.journal = Journal(
            folder if ranks.first else None,
            tensorboard=options.keep.tensorboard,
            terminal=None if quiet or not ranks.first else sys.stderr,
            listener=listener if ranks.first else None,
        )
        if ranks.first:
            with (folder / "options.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        randomness.seed_all(options.seed, ranks.rank)
        copies = options.compute.offload == "none"
        self.checkpoints = Checkpoints(
            folder / "checkpoints", ranks, keep=options.keep.keep, copies=copies
        )
        self.loop: Run | None = None

    def train(
        self,
        decoder: Decoder,
        objective: Objective,
        loader: Loader,
        publish: Callable[[Run], None],
        stop: Stop,
        *,
        validation: Mapping[str, Held],
        began: float,
    ) -> Outcome:
        """Train, and `publish` what was learned where the last step was reached."""
        self.loop = Run(
            decoder,
            objective,
            loader,
            self.options,
            ranks=self.ranks,
            checkpoints=self.checkpoints,
            journal=self.journal,
            validation=validation,
        )
        try:
            outcome = self.loop.run(stop, began=began)
            if outcome == "done":
                publish(self.loop)
            if self.ranks.first:
                plot(last_steps(self.journal.events()), self.out / RUN / "loss.png")
            return outcome
        finally:
            self.journal.close()

    def report(self) -> dict[str, object]:
        """Where the run stands, and where its time went."""
        assert self.loop is not None, "it was trained"
        steps = last_steps(self.journal.events())
        seconds = account(self.journal.events())
        best = self.loop.best
        return {
            "folder": str(self.out),
            "step": self.loop.step,
            "tokens": self.loop.tokens,
            "loss": steps[-1]["loss"] if steps else None,
            **({"best": best.to_json()} if best.step >= 0 else {}),
            "effective": seconds.pop("effective"),
            "seconds": seconds,
        }


def tell(report: Mapping[str, object], outcome: Outcome, steps: int) -> None:
    """The report, for people."""
    seconds = report["seconds"]
    assert isinstance(seconds, dict)
    told = ", ".join(f"{cause} {spent:.1f}" for cause, spent in seconds.items() if spent >= 0.05)
    print(f"{outcome} after step {report['step']} of {steps}; seconds: {told}")
    print(f"effective training time {report['effective']:.1%}")
