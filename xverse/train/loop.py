"""BATCHES -> BETTER MODEL. The only training loop: step after step, judged, counted and kept."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

from xverse.data.loader import Loader, Position, Prefetch, Step
from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.parallel.grid import grid_of
from xverse.parallel.layout import Layout
from xverse.parallel.ranks import Ranks
from xverse.train import flops
from xverse.train.best import Best
from xverse.train.checkpoints import Checkpoints, Loaded
from xverse.train.evaluate import Held, evaluate
from xverse.train.journal import Journal, progress_line
from xverse.train.objective import Objective
from xverse.train.offload import Ferry
from xverse.train.optimizer import Optimizer
from xverse.train.options import Training
from xverse.train.passes import passes_of
from xverse.train.schedule import learning_rate
from xverse.train.stop import Stop
from xverse.train.watchdog import Watchdog

PACE = 20  # latest steps that the time left is reckoned from

Outcome = Literal["done", "stopped"]


class Measured(NamedTuple):
    """A step that was computed and not yet applied, the same on all ranks."""

    loss: float
    norm: float
    also: dict[str, float]


class Run:
    """A decoder, what it shall learn from, and everything that keeps it from being lost.

    `loader` gives the steps; `validation` is evaluated by its parts, each from its beginning. All
    ranks run it alike. After `run` the optimizer has the weights.
    """

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        loader: Loader,
        options: Training,
        *,
        ranks: Ranks,
        checkpoints: Checkpoints,
        journal: Journal,
        validation: Mapping[str, Held] | None = None,
    ) -> None:
        self.decoder, self.loader = decoder, loader
        self.options, self.ranks, self.journal = options, ranks, journal
        self.checkpoints, self.validation = checkpoints, validation or {}
        grid = grid_of(ranks, options.mesh)
        self.passes = passes_of(decoder, objective, grid, options)
        compute = options.compute
        self.layout = Layout(decoder.shape, grid, host=compute.offload != "none")
        ferry = None
        if compute.offload == "optimizer":
            ferry = Ferry(ranks.device, pinned=compute.pin_memory)
        self.optimizer = Optimizer(
            decoder, options.update, seed=options.seed, layout=self.layout, ferry=ferry
        )
        self.watchdog = Watchdog(options.watch)
        self.step = 0  # updates that were made
        self.tokens = 0  # that were learned from
        self.position = Position()  # of the next step's data
        self.best = Best()  # of the evaluations
        self._saved = -1  # the step of the latest checkpoint
        self._paces: deque[float] = deque(maxlen=PACE)
        # The formulas of MFU count the gradients of all weights, which frozen ones have none of.
        whole = all(parameter.requires_grad for parameter in decoder.parameters())
        self._peak = flops.peak(ranks.device) if whole else None

    def run(self, stop: Stop, *, began: float | None = None) -> Outcome:
        """Go on from the newest checkpoint, or begin; until the last step, or until `stop` is
        asked, which is saved within a step. `began`: the time.time() at which the process did.

        Raises XverseError where the run cannot go on: no whole checkpoint, other options than it
        was begun with, or bad steps that rolling back does not cure.
        """
        began = began or time.time()
        self.journal.note("start", time=began)
        self._resume()
        self.checkpoints.reserve(self.optimizer.tensors())
        self.journal.note("ready", step=self.step, seconds=time.time() - began)
        data = Prefetch(self.loader.steps(self.position))
        try:
            while self.step < self.options.steps and not self._hopeless():
                if self.ranks.any(bool(stop.asked)):
                    return self._stopped(stop)
                asked = time.monotonic()
                step = next(data)
                self._advance(step, time.monotonic() - asked, stop)
            self._save(wait=True)
        finally:
            data.close()
            self._settle()
        if self.options.keep.best and self.best.step >= 0:
            self._take_best()
        return "done"

    def _hopeless(self) -> bool:
        """Whether so many evaluations in a row were no better that the run shall end."""
        patience = self.options.keep.patience
        return 0 < patience <= self.best.since

    def _advance(self, step: Step, waited: float, stop: Stop) -> None:
        """One step, whose data was waited for so long, and what falls due after it."""
        began = time.monotonic()
        found = self._compute(step)
        verdict = self.watchdog.judge(found.loss, found.norm)
        self.position = step.after
        if verdict.act == "update":
            self._update(step, found, began, waited)
            keep = self.options.keep
            due = self.step % keep.evaluate_every == 0 or self.step == self.options.steps
            better = bool(self.validation) and due and self._evaluate(stop)
            # After the evaluation, of which a checkpoint knows.
            if self.step % keep.save_every == 0 or (better and keep.best):
                self._save()
            return
        self.optimizer.clear()
        facts = {"loss": found.loss, "norm": found.norm, "why": verdict.why}
        self.journal.note("bad", step=self.step, seconds=time.monotonic() - began, **facts)
        self.journal.say(f"step {self.step + 1} is not made: {verdict.why}")
        if verdict.act == "roll back":
            self._roll_back(verdict.why)

    def _compute(self, step: Step) -> Measured:
        """Gradients of a step, and what all ranks together say of it."""
        part, also = self.passes(step, learn=True)
        self.layout.add_partial(self.decoder)
        squares = self.optimizer.squares().to(part.device)  # of gradients that may be on the host
        told = torch.stack([part, squares, *also.values()]).tolist()
        loss, square, *rest = self.ranks.total(told)
        norm = math.sqrt(square) if square >= 0 else math.nan
        return Measured(loss, norm, dict(zip(also, rest, strict=True)))

    def _update(self, step: Step, found: Measured, began: float, waited: float) -> None:
        update = self.options.update
        rate = learning_rate(self.step, self.options.steps, update)
        clipped = update.clip and found.norm > update.clip
        self.checkpoints.hold()
        self.optimizer.update(self.step, rate, update.clip / found.norm if clipped else 1.0)
        self.tokens += step.tokens
        seconds = time.monotonic() - began
        self._paces.append(seconds)
        speed = step.tokens / seconds
        facts: dict[str, object] = {
            "step": self.step,
            "loss": found.loss,
            "norm": found.norm,
            "rate": rate,
            "tokens": self.tokens,
            "seconds": seconds,
            "waited": waited,
            "pace": sum(self._paces) / len(self._paces),
            "tokens_per_second": speed,
            **self._utilization(speed),
            **found.also,
        }
        self.journal.note("step", **facts)
        if (self.step + 1) % self.options.keep.log_every == 0:
            self.journal.say(progress_line(facts, self.options.steps))
        self.step += 1

    def _utilization(self, speed: float) -> dict[str, float]:
        """MFU by both formulas, where the card's peak is known; see flops."""
        if self._peak is None:
            return {}
        shape, tokens = self.decoder.shape, self.options.row_tokens
        share = speed / (self._peak * self.ranks.size)
        return {
            "mfu": share * flops.strict(shape, tokens),
            "mfu_palm": share * flops.palm(shape, tokens),
        }

    def _evaluate(self, stop: Stop) -> bool:
        """Loss on the validation rows, and whether it is the least so far; left out where `stop` is
        asked meanwhile."""
        began = time.monotonic()
        found = evaluate(
            self.decoder,
            self.passes,
            self.validation,
            self.options.keep.evaluate_rows,
            self.ranks,
            lambda: bool(stop.asked),
        )
        if found is None:
            return False
        seconds = time.monotonic() - began
        self.journal.note("evaluate", step=self.step, seconds=seconds, **found)
        told = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        self.journal.say(f"validation after step {self.step}: {told}")
        return self.best.see(self.step, found["loss"])

    def _stopped(self, stop: Stop) -> Outcome:
        if self._saved != self.step:
            self._save(wait=True)
        self.checkpoints.wait()
        self.journal.note("stop", step=self.step, why=stop.asked or "another rank was asked")
        return "stopped"

    def _facts(self) -> dict[str, object]:
        return {
            "position": self.position.to_json(),
            "tokens": self.tokens,
            "watchdog": self.watchdog.to_json(),
            "best": self.best.to_json(),
            "fixed": self.options.fixed(),
            "options": dataclasses.asdict(self.options),
        }

    def _save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint of now; with `wait`, be sure of it."""
        began = time.monotonic()
        if not wait:
            self._settle()
        self.checkpoints.pinned = self.best.step if self.options.keep.best else -1
        if self._saved != self.step:
            self.checkpoints.save(self.step, self.optimizer.tensors(), self._facts())
            self._saved = self.step
        if wait:
            self.checkpoints.wait()
        self.journal.note("save", step=self.step, seconds=time.monotonic() - began)

    def _settle(self) -> None:
        """See the latest checkpoint through. A failure is told, and the run goes on: the disk may
        have room again when the next one is due."""
        try:
            self.checkpoints.wait()
        except XverseError as error:
            self._saved = -1
            self.journal.note("save failed", step=self.step, why=error.why)
            self.journal.say(f"{error}")

    def _resume(self) -> None:
        found = self.checkpoints.load(self.optimizer.tensors(), check=self._refuse_other_run)
        if found is None:
            return
        self._take(found)
        facts = found.facts
        self.watchdog.restore(facts["watchdog"])
        self.position = Position(**facts["position"])  # type: ignore[arg-type]
        if "best" in facts:  # checkpoints of the first release have none
            self.best = Best.from_json(facts["best"])  # type: ignore[arg-type]
        self.journal.note("resume", step=self.step, refused=list(found.refused))
        self.journal.say(f"goes on after step {self.step}")

    def _roll_back(self, why: str) -> None:
        """Take the latest checkpoint, and go on with the data behind the bad steps."""
        began = time.monotonic()
        self._settle()
        found = self.checkpoints.load(self.optimizer.tensors(), check=self._refuse_other_run)
        if found is None:
            raise XverseError(
                f"Step {self.step + 1} cannot be made.",
                f"{why}; and there is no checkpoint yet to go back to.",
                "Lower the learning rate or lengthen the warm-up, or look at the data.",
            )
        self._take(found)
        self.watchdog.restore(found.facts["watchdog"], rollbacks=False)
        self.watchdog.rolled_back(found.step)
        self.journal.note("rollback", step=self.step, seconds=time.monotonic() - began, why=why)
        self.journal.say(f"rolled back to step {self.step}: {why}")

    def _take_best(self) -> None:
        """The weights of the best evaluation, in the place of the last ones."""
        if self.best.step != self.step:
            found = self.checkpoints.load(self.optimizer.tensors(), only=self.best.step)
            if found is None:
                raise XverseError(
                    f"The weights of step {self.best.step}, the best, are gone.",
                    f"Its checkpoint is no longer in {self.checkpoints.folder}.",
                    "Train again, or leave keep.best out and have the last weights.",
                )
            self._take(found)
        self.journal.note("best", step=self.best.step, loss=self.best.loss)
        self.journal.say(f"the best is step {self.best.step}: loss {self.best.loss:.4f}")

    def _take(self, found: Loaded) -> None:
        self.optimizer.adopt()
        self.step = self._saved = found.step
        tokens = found.facts["tokens"]
        assert isinstance(tokens, int)
        self.tokens = tokens

    def _refuse_other_run(self, facts: Mapping[str, object]) -> None:
        was, now = facts["fixed"], self.options.fixed()
        if was != now:
            raise XverseError(
                "The checkpoint belongs to a run with other options.",
                f"It was begun with {was}, and is to go on with {now}.",
                "Give the options that it was begun with, or another folder for a new run.",
            )
