"""STEPS -> SECONDS BY PHASE. Some steps of the real training loop, timed from outside it."""

import gc
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.train_text import Text
from xverse.data.loader import Batch, Loader, Step
from xverse.model.decoder import Decoder
from xverse.parallel.ranks import Ranks
from xverse.train import flops
from xverse.train.checkpoints import Checkpoints, Loaded
from xverse.train.journal import Journal
from xverse.train.loop import Run
from xverse.train.objective import Objective, Part, pretrain
from xverse.train.options import Computing, Keeping, Training, Updating, Watching
from xverse.train.passes import Whole
from xverse.train.stop import Stop

PHASES = ("data", "forward", "head and loss", "backward", "norm", "optimizer")
NEVER = 10**9


class Unsaved(Checkpoints):
    """Checkpoints of a run that is measured and thrown away."""

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        pass

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        pass

    def load(self, *_args: Any, **_options: Any) -> Loaded | None:
        return None


class Clock:
    """Marks on the device's own time line, read when all is over: reading them waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._marks: list[tuple[str, Any]] = []
        self._cuda = device.type == "cuda"

    def mark(self, phase: str) -> None:
        """From here on it is `phase`."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Of each phase, all together."""
        found: dict[str, float] = defaultdict(float)
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            span = begun.elapsed_time(ended) / 1e3 if self._cuda else ended - begun
            found[phase] += span
        return dict(found)

    def clear(self) -> None:
        self._marks.clear()


@dataclass
class Timed:
    """What the steps after the warm ones took, and what the run said of each."""

    warm: int
    last: int
    device: torch.device
    clock: Clock
    steps: list[dict[str, Any]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    first: float = 0.0  # seconds of the first step, in which everything is compiled
    _began: float = 0.0

    def hear(self, event: Mapping[str, Any]) -> None:
        """A listener of the journal: the timed steps begin behind the warm ones' work."""
        if event["event"] != "step":
            return
        self.steps.append(dict(event))
        number = len(self.steps)
        if number == 1:
            self.first = event["seconds"]
        if number == self.warm:
            self._wait()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.clock.clear()
            self.clock.mark("data")
            self._began = time.perf_counter()
        if number == self.last:
            self.clock.mark("end")
            self._wait()
            self.seconds = time.perf_counter() - self._began
            self.tokens = self.steps[-1]["tokens"] - self.steps[self.warm - 1]["tokens"]
            self.phases = self.clock.seconds()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def training(
    steps: int,
    row_tokens: int,
    rows: int,
    passes: int,
    *,
    master: Literal["float32", "none"] = "none",
    **compute: Any,
) -> Training:
    """Options of a run that a card of 141 GB trains 7B with: bf16 states, rounded at random."""
    return Training(
        steps=steps,
        row_tokens=row_tokens,
        rows_per_step=rows * passes,
        rows_per_pass=rows,
        update=Updating(master=master, moments="bfloat16", learning_rate=3e-4, warmup_steps=20),
        compute=Computing(**{"dtype": "bfloat16", **compute}),
        keep=Keeping(save_every=NEVER, evaluate_every=NEVER, log_every=NEVER),
        watch=Watching(spike=0.0),
    )


def timed_run(
    decoder: Decoder,
    options: Training,
    text: Text,
    ranks: Ranks,
    *,
    warm: int,
    objective: Objective = pretrain,
    lessons: bool = False,
    checkpoints: Callable[[Path], Checkpoints] | None = None,
) -> Timed:
    """All steps of the options through the loop that `xverse pretrain` runs; `lessons` learn
    answers alone. Checkpoints are not written unless some are given."""
    clock = Clock(ranks.device)
    timed = Timed(warm, options.steps, ranks.device, clock)
    loader = Loader(
        text,
        row_tokens=options.row_tokens,
        rows_per_step=options.rows_per_step,
        rows_per_pass=options.rows_per_pass,
        learned=text.learned if lessons else None,
    )
    with tempfile.TemporaryDirectory() as place, Stop() as stop:
        folder = Path(place)
        journal = Journal(folder, listener=timed.hear)
        kept = Unsaved(folder, ranks, keep=1) if checkpoints is None else checkpoints(folder)
        run = Run(
            decoder, objective, loader, options, ranks=ranks, checkpoints=kept, journal=journal
        )
        _listen(run, clock)
        assert run.run(stop) == "done"
        journal.close()
    return timed


def _listen(run: Run, clock: Clock) -> None:
    """Have the parts of a step marked, each where it begins."""
    passes, decoder, optimizer = run.passes, run.decoder, run.optimizer
    assert isinstance(passes, Whole)
    objective, hidden = passes.objective, decoder.hidden
    update = optimizer.update

    def marked_objective(decoder: Decoder, batch: Batch, units: int) -> Part:
        clock.mark("forward")
        part = objective(decoder, batch, units)
        clock.mark("backward")
        return part

    def marked_hidden(*inputs: Any) -> Tensor:
        x_TD = hidden(*inputs)
        clock.mark("head and loss")
        return x_TD

    def marked_passes(step: Step, *, learn: bool) -> tuple[Tensor, dict[str, Tensor]]:
        found = passes(step, learn=learn)
        clock.mark("norm")
        return found

    def marked_update(number: int, rate: float, scale: float) -> None:
        clock.mark("optimizer")
        update(number, rate, scale)
        clock.mark("data")

    passes.objective = marked_objective
    vars(decoder)["hidden"] = marked_hidden
    run.passes = marked_passes
    vars(optimizer)["update"] = marked_update


def figures(
    timed: Timed, decoder: Decoder, options: Training, device: torch.device
) -> dict[str, Any]:
    """Of a run, for the record: speed, both MFUs where all weights learn, phases and memory."""
    counted = len(timed.steps) - timed.warm
    speed = timed.tokens / timed.seconds
    shape, row = decoder.shape, options.row_tokens
    found: dict[str, Any] = {
        "tokens_per_s": round(speed, 1),
        "s_per_step": round(timed.seconds / counted, 4),
        "timed_steps": counted,
        "warm_steps": timed.warm,
        "tokens_per_step": options.rows_per_step * row,
        "rows_per_pass": options.rows_per_pass,
        "first_step_s": round(timed.first, 1),
        "ms_per_step_by_phase": {
            phase: round(1e3 * timed.phases[phase] / counted, 2)
            for phase in PHASES
            if phase in timed.phases
        },
        "losses": [round(step["loss"], 4) for step in timed.steps],
    }
    peak = flops.peak(device)
    if peak is not None:
        found["mfu_strict"] = round(speed * flops.strict(shape, row) / peak, 4)
        found["mfu_palm"] = round(speed * flops.palm(shape, row) / peak, 4)
    if device.type == "cuda":
        found["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        found["reserved_GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    return found


def forget(device: torch.device) -> None:
    """Give back what a run held, compiled code of its shapes included."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
