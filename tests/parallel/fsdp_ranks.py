"""What each process of test_fsdp does: torchrun -m tests.parallel.fsdp_ranks FOLDER NAMES."""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.train.tiny import answer_loader, options, tiny_decoder, tiny_run, tiny_shape
from xverse.parallel.axes import Axes
from xverse.parallel.ranks import Ranks
from xverse.quant.quantize import quantize
from xverse.quant.recipe import NAMED, Recipe
from xverse.train import build
from xverse.train.lora import add_lora
from xverse.train.options import Computing, Keeping, Training, Updating
from xverse.train.stop import Stop
from xverse.train.tuning import Lora

MIXTURE = {"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}
FP32 = Computing(dtype="float32")
MUON = Updating(optimizer="muon", warmup_steps=2, learning_rate=3e-3)

# As the published recipe updates: transformers' schedule, and a norm that is often clipped.
TRAINER = Updating(
    first_step=0,
    warmup_steps=5,
    learning_rate=2e-3,
    lowest_share=0.0,
    weight_decay=0.0,
    beta2=0.999,
    clip=0.5,
)
ANSWERS = options(steps=50, compute=FP32, update=TRAINER, rows_per_pass=1)

# Name of a run -> (fields of its shape, its options); one process trains each of them.
RUNS: dict[str, tuple[dict[str, Any], Training]] = {
    "dense": ({}, options(steps=20, rows_per_step=8, compute=FP32)),
    "mixture": (
        MIXTURE,
        options(steps=20, rows_per_step=8, compute=Computing(dtype="float32", reshard=False)),
    ),
    "muon": ({}, options(steps=8, compute=FP32, update=MUON)),
    "copies": ({}, options(steps=8, compute=FP32)),
    "answers": ({}, ANSWERS),
    "lora": ({}, dataclasses.replace(ANSWERS, steps=8)),
    "qlora": (MIXTURE, dataclasses.replace(ANSWERS, steps=8)),
    "bf16": (MIXTURE, options(steps=4, compute=Computing(dtype="bfloat16"))),
    # An odd vocabulary, a tied head, layers for two stages on each device, and what is recomputed.
    "tied": (
        {"tie_word_embeddings": True, "vocab_size": 67},
        options(steps=20, rows_per_step=8, compute=Computing(dtype="float32", z_loss=1e-3)),
    ),
    "deep": (
        {"num_hidden_layers": 5, "vocab_size": 67},
        options(steps=20, rows_per_step=8, compute=Computing(dtype="float32", recompute="full")),
    ),
}


def train(
    folder: Path,
    name: str,
    ranks: Ranks,
    *,
    mesh: Axes | None = None,
    offload: str = "none",
    run: str = "",
    steps: int | None = None,
) -> None:
    """The run `run` of RUNS over a mesh, in a folder `name`; it goes on with what is there."""
    run = run or name
    changes, training = RUNS[run]
    training = dataclasses.replace(
        training,
        steps=steps or training.steps,
        keep=Keeping(save_every=5, keep=9, evaluate_every=10, evaluate_rows=8),
        mesh=mesh or Axes(data=ranks.size if run == "copies" else 1),
        compute=dataclasses.replace(training.compute, offload=offload),  # type: ignore[arg-type]
    )
    decoder = build.fresh(tiny_shape(**changes), training, ranks)
    loader = None
    if run in ("lora", "qlora"):
        decoder = tiny_decoder(**changes).requires_grad_(False)
        if run == "qlora":
            quantize(decoder, Recipe(NAMED["int8"].scheme))  # head and embedding stay as they are
        decoder = build.prepared(add_lora(decoder, Lora(rank=3, dora=True)), training, ranks)
    if run in ("answers", "lora", "qlora"):
        loader = answer_loader(training, ranks)
    it = tiny_run(
        folder / name,
        training,
        decoder=decoder.train(),
        ranks=ranks,
        loader=loader,
        validation=loader is None,
    )
    assert it.run(Stop()) == "done"
    it.journal.close()
    weights = {key: weight.detach().clone() for key, weight in it.optimizer.weights()}
    if ranks.first:
        torch.save(weights, folder / name / "weights.pt")


def rewind(source: Path, folder: Path, step: int) -> None:
    """A copy of a run as it was after its checkpoint `step`."""
    shutil.copytree(source, folder)
    for later in (folder / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


def main() -> None:
    """Each name is that of a run, or run:mesh such as dense:tensor=2, where offload=optimizer may
    stand too; followed by <other, it goes on with what that one left at step 10."""
    folder, *names = sys.argv[1:]
    ranks = Ranks.start("cpu")
    for one in names:
        name, _, source = one.partition("<")
        run, _, told = name.partition(":")
        sizes = dict(size.split("=") for size in told.split(",") if size)
        offload = sizes.pop("offload", "none")
        mesh = Axes(**{axis: int(size) for axis, size in sizes.items()}) if sizes else None
        if source and ranks.first:
            rewind(Path(folder) / source, Path(folder) / name, 10)
        ranks.any(False)  # until it is there
        train(Path(folder), name, ranks, mesh=mesh, offload=offload, run=run)
    ranks.close()


if __name__ == "__main__":
    main()
