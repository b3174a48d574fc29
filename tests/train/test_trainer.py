"""The published recipe's arithmetic: 50 steps as the Trainer of transformers makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.fsdp_ranks import RUNS
from tests.train.tiny import ALONE, answer_loader, tiny_run, tiny_shape
from xverse.data.loader import Batch, Loader, Position
from xverse.model.decoder import Decoder
from xverse.train import build
from xverse.train.journal import last_steps, read_events
from xverse.train.stop import Stop

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

OPTIONS = RUNS["answers"][1]


def rows(loader: Loader, steps: int) -> list[dict[str, list[int]]]:
    """What the loader's first steps read, row by row, as the Trainer takes it."""
    found: list[dict[str, list[int]]] = []

    def take(batch: Batch) -> None:
        parts = (batch.ids, batch.targets, batch.mask)
        for ids, targets, mask in zip(*(p.split(batch.documents) for p in parts), strict=True):
            labels = torch.where(mask, targets, -100).tolist()
            found.append(
                {"input_ids": [*ids.tolist(), int(targets[-1])], "labels": [-100, *labels]}
            )

    for _, step in zip(range(steps), loader.steps(Position()), strict=False):
        for batch in step.passes:
            take(batch)
    return found


def padded(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    masked = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in batch]
    return {
        name: torch.tensor([row[name] + [pad] * (longest - len(row[name])) for row in masked])
        for name, pad in fill.items()
    }


def llama(decoder: Decoder) -> Any:
    """transformers' own class with the weights of the decoder."""
    shape = decoder.shape
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        tie_word_embeddings=False,
        pad_token_id=None,  # the row of a padding id would not learn, and here it is an id too
    )
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict(decoder.state_dict(), strict=True)
    return model


def trainer_losses(model: Any, data: list[dict[str, list[int]]], folder: Path) -> list[float]:
    """The loss of each step, not rounded as the Trainer's log is."""
    found: list[float] = []
    update = OPTIONS.update

    class Sequential(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_args: object) -> Any:
            return torch.utils.data.SequentialSampler(data)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **named: Any) -> Any:
            loss = super().training_step(*args, **named)
            found.append(float(loss))
            return loss

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=OPTIONS.steps,
        learning_rate=update.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=update.warmup_steps,
        weight_decay=update.weight_decay,
        max_grad_norm=update.clip,
        adam_beta1=update.beta1,
        adam_beta2=update.beta2,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Sequential(model=model, args=arguments, train_dataset=data, data_collator=padded).train()
    return [sum(pair) for pair in zip(found[::2], found[1::2], strict=True)]


def test_losses_are_those_of_the_trainer(tmp_path: Path) -> None:
    """Fifty steps, relative 1e-5 in fp32: gradients, clipping, schedule and updates are its own.

    `test_fsdp` holds the same run over two processes to one process's losses.
    """
    torch.manual_seed(0)
    decoder = build.fresh(tiny_shape(), OPTIONS, ALONE)
    loader = answer_loader(OPTIONS, ALONE)
    expected = trainer_losses(llama(decoder), rows(loader, OPTIONS.steps), tmp_path / "trainer")
    run = tiny_run(tmp_path / "ours", OPTIONS, decoder=decoder, loader=loader)
    assert run.run(Stop()) == "done"
    steps = last_steps(read_events(tmp_path / "ours" / "metrics.jsonl"))
    assert [step["loss"] for step in steps] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.85 * expected[0]
    assert max(step["norm"] for step in steps) > OPTIONS.update.clip  # so some were clipped
