"""WHAT FINE-TUNING GAINS. Held-out loss of one model by each method, beside PEFT + transformers.

    python -m bench.finetune_quality smollm2 --data alpaca_en.json alpaca_zh.json [--steps 40]

Every method reads the same rows in the same order, begins with the same weights and is evaluated on
the same held-out rows, in fp32. PEFT's row is its own LoRA, trained by the Trainer of transformers
on what our loader gives. Each row is written down as soon as it is there.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.record import record
from xverse.checkpoint.gguf_unpack import unpack_gguf
from xverse.checkpoint.resolve import resolve, title_of
from xverse.data.loader import Position
from xverse.data.sample_options import SampleOptions
from xverse.data.samples import Samples, loader_of
from xverse.parallel.grid import grid_of
from xverse.parallel.ranks import Ranks
from xverse.train.evaluate import Held, evaluate
from xverse.train.journal import read_events
from xverse.train.objective import pretrain
from xverse.train.options import Computing, Keeping, Updating, Watching
from xverse.train.passes import passes_of
from xverse.train.tuning import Lora
from xverse.verbs._finetune_run import FineTuningRun
from xverse.verbs.finetune import Config, tune

ALONE = Ranks(0, 1, torch.device("cpu"))
RATES = {"lora": 5e-4, "qlora": 5e-4, "full": 5e-5}
LORA = Lora(rank=8, alpha=16.0)


def main() -> None:
    """All methods in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=200, help="of each file")
    parser.add_argument("--methods", nargs="+", default=["lora", "peft", "qlora", "full"])
    args = parser.parse_args()
    figures: dict[str, object] = {"model": title_of(args.model), "steps": args.steps}
    with tempfile.TemporaryDirectory() as place:
        model = _folder(resolve(args.model), Path(place) / "model")
        for method in args.methods:
            config = _config(model, args, method, Path(place) / method)
            figures[method] = _peft(config) if method == "peft" else _ours(config)
            print(method, json.dumps(figures[method]), flush=True)
            record("finetune_quality", figures, ("transformers", "peft"))


def _folder(model: Path, target: Path) -> Path:
    """A model folder of plain weights, which a GGUF file is not."""
    if model.is_dir():
        return model
    unpack_gguf(model, target)
    return target


def _config(model: Path, args: argparse.Namespace, method: str, out: Path) -> Config:
    weights: Any = "lora" if method == "peft" else method
    return Config(
        model=str(model),
        data=tuple(args.data),
        out=str(out),
        method=weights,
        steps=args.steps,
        row_tokens=256,
        rows_per_step=4,
        held_out=40,
        packing=False,
        device="cpu",
        json=True,
        read=SampleOptions(cutoff=256, max_samples=args.rows),
        lora=LORA,
        update=Updating(
            learning_rate=RATES[weights],
            first_step=0,
            warmup_steps=4,
            lowest_share=0.0,
            weight_decay=0.0,
            beta2=0.999,
        ),
        compute=Computing(dtype="float32"),
        keep=Keeping(save_every=10**6, evaluate_every=10**6, evaluate_rows=0, log_every=10),
        watch=Watching(spike=0.0),
    )


def _ours(config: Config) -> dict[str, object]:
    """Held-out loss before and after, and the seconds between."""
    before, began = _held_loss(config), time.monotonic()
    assert tune(config) == 0
    events = list(read_events(Path(config.out) / "run" / "metrics.jsonl"))
    after = [event["loss"] for event in events if event["event"] == "evaluate"][-1]
    return {"before": before, "after": after, "seconds": time.monotonic() - began}


def _held_loss(config: Config) -> float:
    run = FineTuningRun(config, ALONE)
    decoder = run._decoder()  # adapters add nothing yet; for qlora, weights are rounded already
    assert run.held is not None, "some rows are held out"
    held = {"held_out": Held(run._loader(run.held), 0.0)}
    passes = passes_of(decoder, pretrain, grid_of(ALONE, run.options.mesh), run.options)
    found = evaluate(decoder, passes, held, 0, ALONE, lambda: False)
    assert found is not None, "nothing stops it"
    return found["loss"]


def _peft(config: Config) -> dict[str, object]:
    """The same by PEFT and the Trainer: rows in our loader's order, our learning rates."""
    import peft
    import transformers

    run, update = FineTuningRun(config, ALONE), config.update
    assert isinstance(run.learn, Samples)
    assert isinstance(run.held, Samples)
    torch.manual_seed(config.seed)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        config.model, dtype=torch.float32
    )
    lora = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=int(LORA.alpha),
        target_modules=list(LORA.targets),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora)
    arguments = transformers.TrainingArguments(
        output_dir=config.out,
        use_cpu=True,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.rows_per_step,
        max_steps=config.steps,
        learning_rate=update.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=update.warmup_steps,
        max_grad_norm=update.clip,
        adam_beta1=update.beta1,
        adam_beta2=update.beta2,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    rows = _rows(run.loader, config.steps)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_args: object) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    began = time.monotonic()
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=_collate)
    trainer.train()
    seconds = time.monotonic() - began
    held = loader_of(
        run.held, row_tokens=config.row_tokens, rows_per_step=1, rows_per_pass=1, packing=False
    )
    return {"after": _mean_loss(model, _rows(held, len(run.held))), "seconds": seconds}


def _rows(loader: Any, steps: int) -> list[dict[str, list[int]]]:
    """The rows of so many steps: ids, and labels of which -100 count for nothing."""
    found = []
    for _, step in zip(range(steps), loader.steps(Position()), strict=False):
        for batch in step.passes:
            labels = torch.where(batch.mask, batch.targets, -100).tolist()
            ids = [*batch.ids.tolist(), int(batch.targets[-1])]
            found.append({"input_ids": ids, "labels": [-100, *labels]})
    return found


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    [row] = rows
    return {name: torch.tensor([values]) for name, values in row.items()}


@torch.no_grad()
def _mean_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Nats a token over all rows."""
    model.eval()
    nats = count = 0.0
    for row in rows:
        learned = sum(label != -100 for label in row["labels"])
        nats += float(model(**_collate([row])).loss) * learned
        count += learned
    return nats / count


if __name__ == "__main__":
    main()
