"""HELD-OUT DOCUMENTS -> LOSS. By language, in nats a token and in bits a byte of text."""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xverse.data.loader import Documents, Loader
from xverse.data.shards import Shards
from xverse.model.decoder import Decoder
from xverse.parallel.grid import grid_of
from xverse.parallel.ranks import Ranks
from xverse.train.options import Training
from xverse.train.passes import Passes


@dataclass(frozen=True)
class Held:
    """Documents of one language, and how many targets a byte of their text has; 0: not known."""

    loader: Loader
    targets_per_byte: float


class Chosen:
    """Some documents of others, by their numbers."""

    def __init__(self, source: Documents, numbers: NDArray[np.integer[Any]]) -> None:
        self._source, self._numbers = source, numbers

    @property
    def documents(self) -> int:
        return len(self._numbers)

    @cached_property
    def _lengths(self) -> NDArray[np.integer[Any]]:
        return self._source.lengths()[self._numbers]

    def lengths(self) -> NDArray[np.integer[Any]]:
        return self._lengths

    def document(self, index: int) -> NDArray[np.integer[Any]]:
        return self._source.document(int(self._numbers[index]))


def held_out(shards: Shards, options: Training, ranks: Ranks) -> dict[str, Held]:
    """The documents of each language in `shards` that has any to predict."""
    languages = np.array([group.language for group in shards.groups])[shards.group_codes()]
    found: dict[str, Held] = {}
    for language in sorted({group.language for group in shards.groups}):
        groups = [group for group in shards.groups if group.language == language]
        targets = sum(group.tokens - group.documents for group in groups)
        chosen = Chosen(shards, np.flatnonzero(languages == language))
        if targets and (chosen.lengths() > 1).any():
            loader = loader_of(chosen, options, ranks)
            size = sum(group.bytes for group in groups)
            found[language] = Held(loader, targets / size if size else 0.0)
    return found


def loader_of(documents: Documents, options: Training, ranks: Ranks) -> Loader:
    """The loader of a run: its rows, its seed, this rank's share."""
    grid = grid_of(ranks, options.mesh)
    return Loader(
        documents,
        row_tokens=options.row_tokens,
        rows_per_step=options.rows_per_step,
        rows_per_pass=options.rows_per_pass,
        rank=grid.reader,
        ranks=grid.axes.readers,
        seed=options.seed,
    )


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    passes: Passes,
    held: Mapping[str, Held],
    rows: int,
    ranks: Ranks,
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss over the first `rows` rows of each language (0: all), always the same ones.

    Gives "loss" over all of them, "loss.LANGUAGE" in nats a token and "bits_per_byte.LANGUAGE", and
    what else the objective tells, over all. None where all ranks together find `stopped`.
    """
    was_training = decoder.training
    decoder.eval()  # no dropout, no noise
    try:
        return _evaluate(passes, held, rows, ranks, stopped)
    finally:
        decoder.train(was_training)


def _evaluate(
    passes: Passes,
    held: Mapping[str, Held],
    rows: int,
    ranks: Ranks,
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    found: dict[str, float] = {}
    also: dict[str, float] = {}
    all_nats = all_units = 0.0
    for language, these in held.items():
        loader = these.loader
        nats = units = 0.0
        count = -(-rows // loader.rows_per_step) or None
        for step in itertools.islice(loader.once(), count):
            if ranks.any(stopped()):
                return None
            loss, more = passes(step, learn=False)
            nats += float(loss) * step.units
            for name, value in more.items():
                also[name] = also.get(name, 0.0) + float(value) * step.units
            units += step.units
        nats = ranks.total([nats])[0]
        found[f"loss.{language}"] = nats / units
        if these.targets_per_byte:
            found[f"bits_per_byte.{language}"] = nats / units * these.targets_per_byte / math.log(2)
        all_nats, all_units = all_nats + nats, all_units + units
    totals = ranks.total(list(also.values()))
    told = {name: total / all_units for name, total in zip(also, totals, strict=True)}
    return {"loss": all_nats / all_units, **found, **told}
