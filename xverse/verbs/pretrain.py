"""Train a model on tokenized shards, on one device or many; a second call goes on."""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from xverse import log
from xverse.train.options import Training

if TYPE_CHECKING:
    from xverse.parallel.ranks import Ranks
    from xverse.train.loop import Outcome

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command, started again, goes on


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    """What `xverse pretrain` takes."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder of tokenized shards, as `xverse prepare` writes it."""
    out: str
    """Folder of the run and of the model that comes of it; a run that is in it goes on."""
    shape: str = "from-depth:12"
    """A published name (xverse-7b), a config.json, or from-depth:N."""
    start: str = ""
    """A model to go on from, instead of new weights; its shape is taken."""
    rope_theta: float | None = None
    """Another base of the rotary embedding, for longer contexts (ABF)."""
    ntk_factor: float | None = None
    """Dynamic NTK scaling by this factor, for longer contexts."""
    tokenizer: str = ""
    """The model folder or tokenizer.json that made the shards; else that of `start`, or theirs."""
    validation: str = ""
    """Shards that are evaluated on, one language after another, and never learned from; by default
    those that `xverse prepare` held out."""
    device: str = "auto"
    """cpu, cuda, or auto; under torchrun each process takes a card of its own."""
    dry_run: bool = False
    """Print parameters, arithmetic, memory and time, and train nothing."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Train to the last step, or until SIGTERM or Ctrl-C.

    Exit codes: 0 the model is in `out`; 75 it was stopped and saved, and the same command goes on;
    1 it failed, and what was saved is unharmed.
    """
    from xverse.parallel.ranks import Ranks
    from xverse.train.stop import Stop

    began = time.time()
    with Stop() as stop:
        ranks = Ranks.start(config.device, grouped=config.compute.offload == "parameters")
        try:
            log.setup("WARNING", ranks.rank)
            if config.dry_run:
                return _dry_run(config, ranks)
            from xverse.verbs._pretrain_run import Pretraining

            pretraining = Pretraining(config, ranks)
            outcome = pretraining.train(stop, began)
            if ranks.first:
                _tell(config, outcome, pretraining.report())
            return STOPPED if outcome == "stopped" else 0
        finally:
            ranks.close()


def _dry_run(config: Config, ranks: "Ranks") -> int:
    from xverse.data.shards import Shards
    from xverse.device import free_memory
    from xverse.train import fit, flops, predict
    from xverse.train.build import dtype_of
    from xverse.verbs._pretrain_run import shape_of

    shards = Shards.open(config.shards)
    shape = shape_of(config, shards.vocab_size)
    dtype = str(dtype_of(config.compute, ranks)).removeprefix("torch.")
    memory = predict.memory(shape, config, dtype=dtype, ranks=ranks.size)
    offloaded: dict[str, object] = {}
    for told in fit.offloads(config):
        found = predict.memory(shape, told, dtype=dtype, ranks=ranks.size)
        facts_of = {"total": found.total, "host": found.host, "fits": fit.cards(found)}
        offloaded[told.compute.offload] = facts_of
    peak = flops.peak(ranks.device)
    tokens = config.steps * config.rows_per_step * config.row_tokens
    facts: dict[str, object] = {
        "parameters": shape.num_parameters,
        "active_parameters": shape.num_active_parameters,
        "tokens": tokens,
        "epochs": tokens / max(1, shards.tokens),
        "flops_per_token": flops.strict(shape, config.row_tokens),
        "flops_per_token_palm": flops.palm(shape, config.row_tokens),
        "memory_bytes": dataclasses.asdict(memory) | {"total": memory.total},
        "offload": offloaded,
        "memory_free_bytes": free_memory(ranks.device),
        "seconds": predict.seconds(shape, config, peak=peak, ranks=ranks.size),
        "shape": shape.to_config(),
    }
    if ranks.first:
        _print_plan(config, facts)
    return 0


def _print_plan(config: Config, facts: dict[str, object]) -> None:
    if config.json:
        print(json.dumps(facts))
        return
    memory = facts["memory_bytes"]
    assert isinstance(memory, dict)
    print(f"parameters  {facts['parameters']:,}, {facts['active_parameters']:,} active in a token")
    print(f"data        {facts['tokens']:,} tokens, {facts['epochs']:.2f} epochs")
    print(
        f"arithmetic  {facts['flops_per_token']:,} operations a token: 6 x parameters without the "
        "input embedding + 6 x layers x width x sequence"
    )
    print(f"            {facts['flops_per_token_palm']:,} by PaLM's formula")
    print("memory      GiB on each device")
    free = facts["memory_free_bytes"]
    told = {part: size for part, size in memory.items() if part != "host"} | {"free here": free}
    for part, size in told.items():
        print(f"            {part:<12} {size / 2**30:9.3f}")
    print("offload     GiB on each device, and of its host's memory")
    offloaded = facts["offload"]
    assert isinstance(offloaded, dict)
    for name, found in offloaded.items():
        sizes = f"{found['total'] / 2**30:9.3f} {found['host'] / 2**30:9.3f}"
        fits = "  ".join(
            f"{card} {'yes' if fits else 'no'}" for card, fits in found["fits"].items()
        )
        print(f"            {name:<12} {sizes}   {fits}")
    seconds = facts["seconds"]
    if isinstance(seconds, float):
        print(f"time        {seconds / 3600:.1f} h at half of the device's peak")
    else:
        print("time        unknown: the peak of this device is not known")
    print("next: the same without --dry-run", file=sys.stderr)


def _tell(config: Config, outcome: "Outcome", report: dict[str, object]) -> None:
    if config.json:
        print(json.dumps({"outcome": outcome, **report}))
        return
    from xverse.verbs._training_run import tell

    tell(report, outcome, config.steps)
    again = " ".join(["xverse pretrain", config.shards, "--out", config.out, "..."])
    following = (
        again if outcome == "stopped" else f"xverse generate {config.out} 'Once upon a time'"
    )
    print(f"next: {following}", file=sys.stderr)
