"""OPTIONS -> A RUN. What `xverse pretrain` puts together: shape, data, decoder, and the folder."""

import dataclasses
import functools
from pathlib import Path

from xverse.checkpoint.load import open_checkpoint, open_tokenizer
from xverse.checkpoint.resolve import resolve
from xverse.data.shards import VALIDATION, Shards
from xverse.errors import XverseError
from xverse.files import read_json
from xverse.model.catalog import CATALOG, from_depth
from xverse.model.decoder import Decoder
from xverse.model.shape import ModelShape, RopeScaling
from xverse.parallel.ranks import Ranks
from xverse.text.tokenizer import Tokenizer
from xverse.train import build
from xverse.train.evaluate import Held, held_out, loader_of
from xverse.train.loop import Outcome, Run
from xverse.train.objective import pretrain
from xverse.train.publish import publish
from xverse.train.stop import Stop
from xverse.verbs._training_run import TrainingRun
from xverse.verbs.pretrain import Config


class Pretraining:
    """A run of pre-training, from its options to the model folder."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.out = Path(config.out).expanduser()
        self.shards = Shards.open(config.shards)
        self.tokenizer = _tokenizer(config, self.shards)
        self.shape = shape_of(config, self.shards.vocab_size)
        self.held = _held_out(config, self.shards, ranks)
        record = {"config": dataclasses.asdict(config), "shape": self.shape.to_config()}
        self.run = TrainingRun(self.out, config, ranks, record=record, quiet=config.json)

    def train(self, stop: Stop, began: float) -> Outcome:
        """Train, and write the model folder where the last step was reached."""
        objective = functools.partial(pretrain, z_factor=self.config.compute.z_loss)
        loader = loader_of(self.shards, self.config, self.ranks)
        return self.run.train(
            self._decoder(),
            objective,
            loader,
            self._publish,
            stop,
            validation=self.held,
            began=began,
        )

    def report(self) -> dict[str, object]:
        """Where the run stands, and where its time went."""
        return self.run.report()

    def _decoder(self) -> Decoder:
        if self.config.start:
            return build.continued(self.shape, resolve(self.config.start), self.config, self.ranks)
        return build.fresh(self.shape, self.config, self.ranks)

    def _publish(self, loop: Run) -> None:
        """In what was computed in: masters are rounded to it."""
        publish(
            self.out,
            self.shape,
            loop.optimizer.weights(),
            self.tokenizer,
            self.ranks,
            dtype=build.dtype_of(self.config.compute, self.ranks),
            trained={"steps": loop.step, "tokens": loop.tokens},
        )


def _held_out(config: Config, shards: Shards, ranks: Ranks) -> dict[str, Held]:
    """What is evaluated on: the shards named, or those held out beside the ones learned from."""
    beside = shards.folder / VALIDATION
    if config.validation or beside.is_dir():
        return held_out(Shards.open(config.validation or beside), config, ranks)
    return {}


def _tokenizer(config: Config, shards: Shards) -> Tokenizer:
    """The tokenizer that made the shards, by its sha256 where they tell it."""
    named = config.tokenizer or config.start
    path = resolve(named) if named else shards.folder
    if not named and not (path / "tokenizer.json").exists():
        raise XverseError(
            "Which tokenizer made the shards is not known.",
            f"{path} has no tokenizer.json, and the model would have none.",
            "Name it with --tokenizer.",
        )
    tokenizer = open_tokenizer(path if path.is_dir() else path.parent)
    told = shards.tokenizer_sha256
    if told and tokenizer.sha256() != told:
        raise XverseError(
            f"{path} is not the tokenizer that made the shards.",
            f"Their index.json names one with the sha256 {told[:16]}...",
            "Name that one with --tokenizer, or prepare the data again with this one.",
        )
    return tokenizer


def shape_of(config: Config, vocab_size: int) -> ModelShape:
    """The shape of the model, which has a row for every id of the shards."""
    if config.start:
        shape = open_checkpoint(resolve(config.start)).shape
    elif config.shape.startswith("from-depth:"):
        depth = config.shape.removeprefix("from-depth:")
        shape = from_depth(int(depth) if depth.isdecimal() else 0, vocab_size, config.row_tokens)
    elif config.shape in CATALOG:
        shape = CATALOG[config.shape]
    elif Path(config.shape).expanduser().exists():
        file = Path(config.shape).expanduser()
        shape = ModelShape.from_config(read_json(file / "config.json" if file.is_dir() else file))
    else:
        raise XverseError(
            f"There is no shape {config.shape!r}.",
            f"It is neither a file nor one of {', '.join(CATALOG)}.",
            "Name one of these, a config.json, or from-depth:N.",
        )
    if shape.vocab_size < vocab_size:
        raise XverseError(
            f"The shards have {vocab_size:,} ids, and the model {shape.vocab_size:,}.",
            "They were made with another tokenizer than the model is for.",
            "Prepare them with the model's tokenizer, or give a shape with a larger vocab_size.",
        )
    changes: dict[str, object] = {
        "max_position_embeddings": max(shape.max_position_embeddings, config.row_tokens)
    }
    if config.rope_theta is not None:
        changes["rope_theta"] = config.rope_theta
    if config.ntk_factor is not None:
        changes["max_position_embeddings"] = shape.max_position_embeddings
        changes["rope_scaling"] = RopeScaling("dynamic", config.ntk_factor)
    return dataclasses.replace(shape, **changes)  # type: ignore[arg-type]
