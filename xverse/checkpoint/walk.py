"""MODEL -> SMALLER MODEL, ONE BLOCK IN MEMORY. Read, rounded, compared, written aside, let go."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from xverse.checkpoint.convert import save_weights
from xverse.checkpoint.load import Reader
from xverse.checkpoint.quantized import put_places
from xverse.checkpoint.save import published_tensors
from xverse.checkpoint.weights import Weights, open_weights
from xverse.files import read_json, write_json
from xverse.log import progress
from xverse.model.decoder import Block, Decoder
from xverse.model.shape import ModelShape
from xverse.quant.calibrate import CALIBRATED, Method, quantize_block
from xverse.quant.compare import Quality, compare
from xverse.quant.passage import Passage
from xverse.quant.quantize import quantize_ends
from xverse.quant.recipe import Recipe
from xverse.quant.stored import layout_of
from xverse.quant.stored_compressed import to_config

ERRORS = "errors.json"


@dataclass(frozen=True)
class Parts:
    """Finished blocks on the disk, each a folder of weights; without a folder none is kept."""

    folder: Path | None

    def has(self, number: int) -> bool:
        """Whether the block is finished."""
        return self.folder is not None and self._part(number).is_dir()

    def write(self, number: int, decoder: Decoder, errors: dict[str, float]) -> None:
        """Keep the block of the decoder, whole or not at all."""
        if self.folder is None:
            return
        unfinished = self.folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        save_weights(published_tensors(decoder, within=name_of(number)), unfinished)
        write_json(unfinished / ERRORS, dict(errors))
        unfinished.rename(self._part(number))

    def weights(self, number: int) -> Weights:
        """The tensors of a finished block."""
        return open_weights(self._part(number))

    def errors(self, number: int) -> dict[str, float]:
        """The relative errors of its layers."""
        stored = read_json(self._part(number) / ERRORS)
        return {name: float(str(value)) for name, value in stored.items()}

    def _part(self, number: int) -> Path:
        assert self.folder is not None, "nothing is kept"
        return self.folder / f"block-{number:05}"


@dataclass
class Outcome:
    """What came of it: bytes in memory, and relative errors by the names of the layers."""

    nbytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    quality: Quality | None = None

    def count(self, name: str, module: nn.Module, errors: dict[str, float]) -> None:
        """Add a finished module of this name."""
        tensors = [*module.parameters(), *module.buffers()]
        self.nbytes += sum(tensor.nbytes for tensor in tensors)
        self.errors |= {".".join(filter(None, (name, key))): errors[key] for key in errors}


class Walk:
    """One way through a model from its first block to its last.

    `source` and `small` are the model before and after; of either only the ends, embedding, norm
    and head, are always there.
    """

    def __init__(
        self,
        shape: ModelShape,
        weights: Weights,
        recipe: Recipe,
        method: Method,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.recipe, self.method = shape, recipe, method
        self.dtype, self.device = dtype, device
        with torch.device("meta"):
            self.source, self.small = Decoder(shape), Decoder(shape)
        self.reader = Reader(weights, self.source, None, dtype, device)

    def run(
        self, parts: Parts, samples: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]]
    ) -> Outcome:
        """Quantize every block that is not among the finished `parts`; compare on `held_out`."""
        for name in ends(self.source):
            self.small.set_submodule(name, self.reader.fill(name))
        outcome = Outcome(errors=quantize_ends(self.small, self.recipe, self.method))
        for name in ends(self.small):
            outcome.count("", self.small.get_submodule(name), {})
        seen = Passage(self.small, samples if self.method in CALIBRATED else ())
        before, after = Passage(self.source, held_out), Passage(self.small, held_out)
        count = self.shape.num_hidden_layers
        whole = True  # every tensor was asked for
        for number in progress(range(count), total=count, label="quantizing"):
            finished = parts.has(number)
            if held_out or not finished:
                before.advance(self.reader.fill(name_of(number)))
            else:
                whole = False
            errors = parts.errors(number) if finished else self._quantize(number, seen)
            if finished:
                seen.advance(self._restore(number, parts.weights(number)))
            else:
                parts.write(number, self.small, errors)
            block = self.small.get_submodule(name_of(number))
            after.advance(block)
            outcome.count(name_of(number), block, errors)
            self._let_go(number)
        if whole:
            self.reader.refuse_leftovers()
        outcome.quality = compare(before, after) if held_out else None
        return outcome

    def tensors(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the quantized model as it stands on disk, one at a time."""
        for name in ends(self.small):
            yield from published_tensors(self.small, within=name)
        for number in range(self.shape.num_hidden_layers):
            weights = parts.weights(number)
            for name, info in weights.infos().items():
                yield name, weights.read(name, info.dtype)

    def _quantize(self, number: int, seen: Passage) -> dict[str, float]:
        """The source's block, rounded, in the small model."""
        name = name_of(number)
        self.small.set_submodule(name, self.source.get_submodule(name))
        block = self.small.get_submodule(name)
        return quantize_block(block, self.recipe.scheme, self.method, seen)

    def _restore(self, number: int, weights: Weights) -> nn.Module:
        """A finished block, from the disk into the small model."""
        layout = layout_of(to_config(self.recipe))
        put_places(self.small, layout, weights.infos())
        reader = Reader(weights, self.small, layout, self.dtype, self.device)
        return reader.fill(name_of(number))

    def _let_go(self, number: int) -> None:
        for decoder in (self.source, self.small):
            with torch.device("meta"):
                decoder.model.layers[number] = Block(self.shape, number)


def name_of(number: int) -> str:
    """A block, as the decoder names it."""
    return f"model.layers.{number}"


def ends(decoder: Decoder) -> list[str]:
    """What of a decoder is outside its blocks."""
    head = [] if decoder.lm_head is None else ["lm_head"]
    return ["model.embed_tokens", "model.norm", *head]
