"""Fine-tune a model on conversations or preferences: all weights, or adapters on small cards."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from xverse import log
from xverse.data.sample_options import SampleOptions
from xverse.errors import XverseError
from xverse.parallel.axes import Axes
from xverse.train.options import Computing, Keeping, Updating, Watching
from xverse.train.tuning import Dpo, FineTuning, Lora, Weights

if TYPE_CHECKING:
    from xverse.train.journal import Listener
    from xverse.train.loop import Outcome

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on
RATES = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
DPO_RATE = 5e-6


def _updating() -> Updating:
    return Updating(
        learning_rate=0.0, warmup_steps=10, lowest_share=0.0, weight_decay=0.0, beta2=0.999
    )


def _keeping() -> Keeping:
    return Keeping(save_every=200, evaluate_every=200, evaluate_rows=0, log_every=10, best=True)


def _watching() -> Watching:
    return Watching(spike=0.0)  # losses of few answers differ more than a spike does


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse finetune` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, alias or hub id of the model that learns."""
    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, folders, or names in a dataset_info.json; see docs/finetune-data.md."""
    out: str
    """Folder of what comes of it, a model or (LoRA) an adapter; a run that is in it goes on."""
    method: Literal["full", "lora", "qlora", "dpo"] = "lora"
    """full: all weights learn; lora, qlora: adapters; dpo: from preferences, see dpo.weights."""
    integers: Literal["int4", "int8"] = "int4"
    """What qlora rounds the frozen weights to; a model that is quantized stays as it is."""
    format: str = ""
    """Chat format of the prompts: v1, v2, v3, default, xverse or template; else the model's own."""
    epochs: float = 3.0
    """How often everything is read."""
    steps: int = 0
    """Updates of the weights; 0: as many as the epochs have."""
    warmup_share: float = 0.0
    """Share of the steps that warm up, instead of update.warmup_steps."""
    row_tokens: int = 2048
    """Tokens in a row: the longest sample (or pair) that there is room for."""
    rows_per_step: int = 16
    """Rows of one update, over all devices."""
    rows_per_pass: int = 1
    """Rows that go through the model at once; the rest of a device's share is accumulated."""
    packing: bool = True
    """Several samples in a row, none of which sees another; else one."""
    held_out: float = 0.05
    """Share of the data (from 1 on: rows) that is evaluated on and never learned from."""
    validation: tuple[str, ...] = ()
    """Data that is evaluated on, instead of a part of what is learned from."""
    noise: float = 0.0
    """NEFTune's alpha: noise on token vectors while training; 0: none."""
    seed: int = 0
    preview: int = 0
    """Show so many samples with what is learned of them in colour, and train nothing."""
    device: str = "auto"
    """cpu, cuda, or auto; under torchrun each process takes a card of its own."""
    dry_run: bool = False
    """Print steps, and memory by method and card, and train nothing."""
    json: bool = False
    """Print one JSON object."""
    read: SampleOptions = field(default_factory=SampleOptions)
    lora: Lora = field(default_factory=Lora)
    dpo: Dpo = field(default_factory=Dpo)
    update: Updating = field(default_factory=_updating)
    """learning_rate 0: 2e-5 for full, 2e-4 for adapters, 5e-6 for dpo."""
    compute: Computing = field(default_factory=Computing)
    keep: Keeping = field(default_factory=_keeping)
    watch: Watching = field(default_factory=_watching)
    mesh: Axes = field(default_factory=Axes)

    @property
    def weights(self) -> Weights:
        """What learns, whichever way."""
        return self.dpo.weights if self.method == "dpo" else self.method

    def training(self, steps: int, documents: int) -> FineTuning:
        """The options of the run that reads `documents` in so many steps."""
        rate = DPO_RATE if self.method == "dpo" else RATES[self.weights]
        update = self.update
        if not update.learning_rate:
            update = dataclasses.replace(update, learning_rate=rate)
        if self.warmup_share:
            warmup = math.ceil(self.warmup_share * steps)
            update = dataclasses.replace(update, warmup_steps=warmup)
        compute = self.compute
        if self.weights != "full" or self.method == "dpo":
            compute = dataclasses.replace(compute, balance=0.0)  # a frozen router stays
        return FineTuning(
            steps=steps,
            row_tokens=self.row_tokens,
            rows_per_step=self.rows_per_step,
            rows_per_pass=self.rows_per_pass,
            seed=self.seed,
            update=update,
            compute=compute,
            keep=self.keep,
            watch=self.watch,
            mesh=self.mesh,
            model=self.model,
            documents=documents,
            packing=self.packing,
            weights=self.weights,
            dpo=self.method == "dpo",
            lora=self.lora,
        )


def run(config: Config) -> int:
    """Train to the last step, or until SIGTERM or Ctrl-C.

    Exit codes: 0 what was asked for is in `out`; 75 it was stopped and saved, and the same command
    goes on; 1 it failed, and what was saved is unharmed.
    """
    return tune(config)


def tune(config: Config, listener: Callable[[int, float], "Listener"] | None = None) -> int:
    """As `run`; what `listener` gives for the steps of the run, and of an epoch, is told, on rank
    0, all that goes into metrics.jsonl."""
    _check(config)
    from xverse.parallel.ranks import Ranks
    from xverse.train.stop import Stop

    began = time.time()
    with Stop() as stop:
        ranks = Ranks.start(config.device, grouped=config.compute.offload == "parameters")
        try:
            log.setup("WARNING", ranks.rank)
            from xverse.verbs._finetune_run import FineTuningRun

            tuning = FineTuningRun(config, ranks)
            if config.preview:
                return tuning.preview(config.preview)
            if ranks.first:
                _print_plan(config, tuning.plan(), tuning.steps)
            if config.dry_run:
                return 0
            heard = listener(tuning.steps, tuning.steps_per_epoch) if listener else None
            outcome = tuning.train(stop, began, heard)
            if ranks.first:
                _tell(config, outcome, tuning.report(), tuning.steps)
            return STOPPED if outcome == "stopped" else 0
        finally:
            ranks.close()


def _check(config: Config) -> None:
    """Raise XverseError for what has no meaning together."""
    if config.noise < 0 or (config.noise and config.method == "dpo"):
        raise XverseError(
            f"The noise {config.noise:g} cannot be.",
            "It is 0 or more, and for answers that are learned, not for preferences.",
            "Leave --noise out.",
        )
    if not config.epochs > 0 or config.steps < 0 or not 0 <= config.warmup_share <= 1:
        raise XverseError(
            f"{config.epochs:g} epochs, {config.steps} steps and a warm-up of "
            f"{config.warmup_share:g} of them cannot be.",
            "Something must be read, and the warm-up is a share of it.",
            "Correct --epochs, --steps or --warmup-share.",
        )
    if (config.keep.patience or config.keep.best) and not (config.held_out or config.validation):
        raise XverseError(
            "There is no best evaluation without evaluations.",
            "Nothing is held out, and keep.best or keep.patience is asked for.",
            "Hold out a part with --held-out, or add --keep.no-best.",
        )


def _print_plan(config: Config, plan: dict[str, object], steps: int) -> None:
    """The plan: on a dry run the result, else what is said before the start."""
    if config.json:
        if config.dry_run:
            print(json.dumps(plan))
        return
    out = sys.stdout if config.dry_run else sys.stderr
    data, memory = plan["data"], plan["memory_bytes"]
    assert isinstance(data, dict)
    assert isinstance(memory, dict)
    facts = ", ".join(f"{name} {value:,}" for name, value in data.items())
    print(f"data    {facts}", file=out)
    print(f"run     {steps:,} steps: {config.epochs:g} epochs of {data['rows_read']:,}", file=out)
    free = plan["memory_free_bytes"]
    assert isinstance(free, int)
    print(f"memory  GB on each device, of which {free / 1e9:.1f} are free here, and host", file=out)
    shown = memory if config.dry_run else {plan["method"]: memory[plan["method"]]}
    for method, found in shown.items():
        fits = [f"{card} {'yes' if fits else 'no'}" for card, fits in found["fits"].items()]
        sizes = f"{found['total'] / 1e9:8.2f} {found['host'] / 1e9:8.2f}"
        print(f"        {method:<26} {sizes}   {'  '.join(fits)}", file=out)
    if config.dry_run:
        print("next: the same without --dry-run", file=sys.stderr)


def _tell(config: Config, outcome: "Outcome", report: dict[str, object], steps: int) -> None:
    if config.json:
        print(json.dumps({"outcome": outcome, **report}))
        return
    from xverse.verbs._training_run import tell

    tell(report, outcome, steps)
    again = " ".join(["xverse finetune", config.model, *config.data, "--out", config.out, "..."])
    if outcome == "stopped":
        following = again
    elif config.weights == "full":
        following = f"xverse chat {config.out}"
    else:
        following = f"xverse export {config.model} MERGED --to merged --adapter {config.out}"
    print(f"next: {following}", file=sys.stderr)
