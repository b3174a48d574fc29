"""WHAT A RUN IS TOLD. The options of training, and which of them cannot be; nothing heavy."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from xverse.errors import XverseError
from xverse.parallel.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Updating:
    """How weights are updated."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the blocks, and AdamW for all else."""
    learning_rate: float = 3e-4
    """The highest of the schedule."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, then a linear decay over the last `decay_share` of the steps."""
    first_step: Literal[0, 1] = 1
    """The number of the first step in the schedule: 1, or 0 as transformers has it, where the first
    step of a warm-up changes nothing."""
    warmup_steps: int = 100
    lowest_share: float = 0.1
    """Of the learning rate, at the schedule's end."""
    decay_share: float = 0.2
    weight_decay: float = 0.1
    """Of matrices; norms, biases and the embedding have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 never clips."""
    master: Literal["float32", "none"] = "float32"
    """none: bfloat16 weights alone, rounded at random so that small updates count."""
    moments: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How a step is computed."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """selective keeps the results of matrix products and attention; full those of blocks alone."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile of every block; auto: on a GPU."""
    fp8: bool = False
    """Matrix products of the blocks in 8 bits, where the device has them; weights stay as is."""
    z_loss: float = 0.0
    """Factor of the z-loss, which keeps logits small."""
    balance: float = 0.01
    """Factor of the loss that spreads tokens over experts; dense models have none."""
    reshard: bool = True
    """Give back gathered weights after a block, and gather them again for its backward pass."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in the host's memory, and is updated there: masters and moments, or with
    `parameters` the weights and their gradients too, which come to the device block by block."""
    pin_memory: bool = True
    """Lock memory of the host that is copied to or from a GPU: faster, and it cannot be swapped."""


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """What is kept of a run, and how often."""

    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept."""
    evaluate_every: int = 500
    """Steps between evaluations on the validation shards, if there are any."""
    evaluate_rows: int = 64
    """Rows of each; 0: all there are."""
    best: bool = False
    """Take the weights of the evaluation with the least loss in the end, not the last ones."""
    patience: int = 0
    """Evaluations in a row that are no better than the best; after them the run ends. 0: never."""
    log_every: int = 1
    """Steps between lines on the terminal; metrics.jsonl has every step."""
    tensorboard: bool = False
    """Write TensorBoard's files too; needs the extra [train]."""


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What is a bad step, and what is done."""

    spike: float = 6.0
    """Standard deviations above the mean of the latest losses; 0: only what is not finite."""
    window: int = 128
    """Losses that the mean is of; half as many must be there before anything is a spike."""
    patience: int = 5
    """Bad steps in a row that are skipped; after them, the latest checkpoint is taken."""
    rollbacks: int = 3
    """To one checkpoint; after them the run ends."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A whole run."""

    steps: int = 1000
    """Updates of the weights."""
    row_tokens: int = 4096
    """Tokens in a row: the longest that documents are seen as one."""
    rows_per_step: int = 16
    """Rows of one update, over all devices."""
    rows_per_pass: int = 1
    """Rows that go through the model at once; the rest of a device's share is accumulated."""
    seed: int = 0
    update: Updating = field(default_factory=Updating)
    compute: Computing = field(default_factory=Computing)
    keep: Keeping = field(default_factory=Keeping)
    watch: Watching = field(default_factory=Watching)
    mesh: Axes = field(default_factory=Axes)

    def __post_init__(self) -> None:
        _require(self, at_least=1, names=("steps", "row_tokens", "rows_per_step", "rows_per_pass"))
        _require(self.keep, at_least=1, names=("save_every", "keep", "evaluate_every", "log_every"))
        _require(self.watch, at_least=1, names=("window", "patience"))
        update = self.update
        _require(
            update,
            at_least=0,
            names=("learning_rate", "warmup_steps", "clip", "weight_decay", "decay_share"),
        )
        _require(self.keep, at_least=0, names=("evaluate_rows", "patience"))
        for name in ("beta1", "beta2", "lowest_share", "decay_share"):
            value = getattr(update, name)
            if not 0 <= value <= 1 or (value == 1 and name.startswith("beta")):
                raise _impossible(name, value, "it is a share, below 1 for a beta")
        if update.master == "none" and self.compute.dtype == "float32":
            raise _impossible("master", "none", "float32 weights are their own master; leave it")
        self._require_offload()

    def _require_offload(self) -> None:
        offload = self.compute.offload
        if offload == "none":
            return
        if self.update.optimizer != "adamw":
            raise XverseError(
                f"The optimizer {self.update.optimizer} cannot be offloaded.",
                "Its update multiplies matrices, which at 7B takes a CPU minutes a step.",
                "Take update.optimizer adamw, or leave compute.offload out.",
            )
        cut = [n for n in ("tensor", "pipeline", "context", "expert") if getattr(self.mesh, n) > 1]
        if offload == "parameters" and cut:
            raise XverseError(
                f"Parameters cannot be offloaded over {cut[0]!r} of [mesh].",
                "FSDP2 brings whole blocks to a device, and these axes have parts of them there.",
                "Take data and shard alone, or compute.offload optimizer.",
            )

    def fixed(self) -> dict[str, object]:
        """What must stay the same when a run goes on: it decides which numbers come out."""
        facts = dataclasses.asdict(self)
        return {
            **{key: facts[key] for key in ("row_tokens", "rows_per_step", "seed")},
            "optimizer": self.update.optimizer,
        }


def _require(options: object, *, at_least: float, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _impossible(name, value, "it is a number")
        if not value >= at_least:
            raise _impossible(name, value, f"it must be {at_least} or more")


def _impossible(name: str, value: object, why: str) -> XverseError:
    return XverseError(f"The option {name} = {value!r} cannot be.", why + ".", "Correct it.")
