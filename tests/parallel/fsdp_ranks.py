"""What each process of test_fsdp does: torchrun -m tests.parallel.fsdp_ranks FOLDER NAMES."""

import dataclasses
import sys
from pathlib import Path

from tests.train.tiny import answer_loader, options, tiny_decoder, tiny_run, tiny_shape
from xverse.parallel.ranks import Ranks
from xverse.quant.quantize import quantize
from xverse.train import build
from xverse.train.lora import add_lora
from xverse.train.options import Axes, Computing, Keeping, Training, Updating
from xverse.train.stop import Stop
from xverse.train.tuning import Lora

MIXTURE = {"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}
FP32 = Computing(dtype="float32")

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

# Name of a run -> (fields of its shape, its options).
RUNS: dict[str, tuple[dict[str, int], Training]] = {
    "dense": ({}, options(steps=20, rows_per_step=8, compute=FP32)),
    "mixture": (
        MIXTURE,
        options(steps=20, rows_per_step=8, compute=Computing(dtype="float32", reshard=False)),
    ),
    "muon": (
        {},
        options(
            steps=8,
            compute=FP32,
            update=Updating(optimizer="muon", warmup_steps=2, learning_rate=3e-3),
        ),
    ),
    "copies": ({}, options(steps=8, compute=FP32, mesh=Axes(data=0))),
    "answers": ({}, ANSWERS),
    "lora": ({}, dataclasses.replace(ANSWERS, steps=8)),
    "qlora": (MIXTURE, dataclasses.replace(ANSWERS, steps=8)),
    "bf16": (MIXTURE, options(steps=4, compute=Computing(dtype="bfloat16"))),
}


def train(folder: Path, name: str, ranks: Ranks, *, steps: int | None = None) -> None:
    """One of RUNS, in a folder of its name; it goes on with what is there."""
    changes, training = RUNS[name]
    if training.mesh.data == 0:  # as many copies as there are processes
        training = dataclasses.replace(training, mesh=Axes(data=ranks.size))
    training = dataclasses.replace(
        training, steps=steps or training.steps, keep=Keeping(save_every=5, keep=9)
    )
    decoder = build.fresh(tiny_shape(**changes), training, ranks)
    loader = None
    if name in ("lora", "qlora"):
        decoder = tiny_decoder(**changes).requires_grad_(False)
        if name == "qlora":
            quantize(decoder, "int8")
        decoder = build.prepared(add_lora(decoder, Lora(rank=3, dora=True)), training, ranks)
    if name in ("answers", "lora", "qlora"):
        loader = answer_loader(training, ranks)
    run = tiny_run(folder / name, training, decoder=decoder.train(), ranks=ranks, loader=loader)
    assert run.run(Stop()) == "done"
    run.journal.close()


def main() -> None:
    folder, *names = sys.argv[1:]
    ranks = Ranks.start("cpu")
    for name in names:
        train(Path(folder), name, ranks)
    ranks.close()


if __name__ == "__main__":
    main()
