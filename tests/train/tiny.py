"""A small decoder, small documents to learn, and a run of them that takes a second."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from xverse.data.loader import Loader
from xverse.data.samples import Sample, Samples, samples_of
from xverse.data.samples import loader_of as lessons_loader
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape
from xverse.parallel.axes import Axes
from xverse.parallel.ranks import Ranks
from xverse.train.checkpoints import Checkpoints
from xverse.train.evaluate import Held, loader_of
from xverse.train.journal import Journal
from xverse.train.loop import Run
from xverse.train.objective import Objective, pretrain
from xverse.train.options import Keeping, Training, Updating

VOCABULARY = 64
ALONE = Ranks(0, 1, torch.device("cpu"))


class Documents:
    """Counting upwards from anywhere, with strides: easy to learn, and of many lengths."""

    def __init__(self, count: int = 200, seed: int = 1) -> None:
        generator = np.random.default_rng(seed)
        self._documents = [
            (np.arange(length) * stride + start).astype(np.uint16) % VOCABULARY
            for length, stride, start in zip(
                generator.integers(2, 50, count),
                generator.integers(1, 4, count),
                generator.integers(0, VOCABULARY, count),
                strict=True,
            )
        ]
        self.documents = count

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array([len(document) for document in self._documents])

    def document(self, index: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return self._documents[index]


def answers(count: int = 60) -> Samples:
    """Of each of the documents above, a beginning that is read and a rest that is learned."""
    documents = Documents(count, seed=3)
    found = []
    for index in range(count):
        ids = documents.document(index).astype(np.int32)
        found.append(Sample(ids, np.arange(len(ids)) > len(ids) // 3))
    samples = samples_of(found)
    assert isinstance(samples, Samples)
    return samples


def answer_loader(training: Training, ranks: Ranks) -> Loader:
    """A loader of `answers`, one in a row."""
    return lessons_loader(
        answers(),
        row_tokens=training.row_tokens,
        rows_per_step=training.rows_per_step,
        rows_per_pass=training.rows_per_pass,
        rank=ranks.rank,
        ranks=ranks.size,
        packing=False,
    )


def tiny_shape(**changes: Any) -> ModelShape:
    fields: dict[str, Any] = {
        "model_type": "xverse",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ModelShape(**fields | changes)


def tiny_decoder(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Decoder:
    decoder = initialize(Decoder(tiny_shape(**changes)), seed=seed).to(dtype)
    for name, parameter in decoder.named_parameters():
        if name.endswith("router.weight"):
            parameter.data = parameter.data.float()
    return decoder


def options(**changes: Any) -> Training:
    fields: dict[str, Any] = {
        "steps": 12,
        "row_tokens": 64,
        "rows_per_step": 4,
        "rows_per_pass": 2,
        "update": Updating(warmup_steps=2, learning_rate=3e-3),
        "keep": Keeping(save_every=4, keep=2),
        "mesh": Axes(),
    }
    return Training(**fields | changes)


def tiny_run(
    folder: Path,
    training: Training | None = None,
    *,
    decoder: Decoder | None = None,
    objective: Objective = pretrain,
    ranks: Ranks = ALONE,
    validation: bool = False,
    documents: Documents | None = None,
    loader: Loader | None = None,
) -> Run:
    """A run in `folder`, which goes on with what is there."""
    training = training or options()

    return Run(
        decoder if decoder is not None else tiny_decoder(),
        objective,
        loader or loader_of(documents or Documents(), training, ranks),
        training,
        ranks=ranks,
        checkpoints=Checkpoints(
            folder / "checkpoints",
            ranks,
            keep=training.keep.keep,
            copies=training.compute.offload == "none",
        ),
        journal=Journal(folder if ranks.first else None),
        validation={"en": Held(loader_of(Documents(seed=2), training, ranks), 0.5)}
        if validation
        else None,
    )
