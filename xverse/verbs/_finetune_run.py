"""OPTIONS -> A RUN. What `xverse finetune` puts together: samples, decoder, loss, result."""

import contextlib
import dataclasses
import functools
from pathlib import Path

from xverse.checkpoint.load import open_checkpoint, open_tokenizer
from xverse.checkpoint.resolve import resolve
from xverse.data.lessons import read_samples
from xverse.data.loader import Loader
from xverse.data.report import Report
from xverse.data.samples import Pairs, Samples, loader_of
from xverse.device import free_memory
from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.parallel.grid import grid_of
from xverse.parallel.ranks import Ranks
from xverse.text.chat import chat_format, format_named
from xverse.train import build, fit, objective
from xverse.train.evaluate import Held
from xverse.train.journal import Listener
from xverse.train.loop import Outcome, Run
from xverse.train.lora import switched_off
from xverse.train.noise import noisy
from xverse.train.objective import Objective
from xverse.train.publish import publish
from xverse.train.publish_adapter import publish_adapter
from xverse.train.stop import Stop
from xverse.verbs._training_run import RUN, TrainingRun
from xverse.verbs.finetune import Config

REFUSED = "refused.jsonl"  # rows that could not be learned from, beside the run's metrics


class FineTuningRun:
    """A run of fine-tuning, from its options to the model or adapter folder."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.out = Path(config.out).expanduser()
        self.folder = _model_folder(config.model)
        self.checkpoint = open_checkpoint(self.folder)
        self.tokenizer = open_tokenizer(self.folder)
        self.chat = (
            format_named(config.format, self.tokenizer)
            if config.format
            else chat_format(self.checkpoint.config, self.tokenizer)
        )
        self.learn, self.held, self.report_of_data = self._samples()
        self.loader = self._loader(self.learn)
        self.steps = config.steps or self.loader.steps_in(config.epochs)
        self.steps_per_epoch = self.loader.steps_in(1000) / 1000  # which need not be whole
        self._require_context()
        self.options = config.training(self.steps, self.learn.documents)
        self.run: TrainingRun | None = None

    def plan(self) -> dict[str, object]:
        """What is read, and the memory that every method would take here and on usual cards."""
        config = self.config
        dtype = str(build.dtype_of(config.compute, self.ranks)).removeprefix("torch.")
        found = fit.plan(
            self.checkpoint.shape,
            self.options,
            config.lora,
            dtype=dtype,
            ranks=self.ranks.size,
            dpo=config.method == "dpo",
        )
        told = {
            method: dataclasses.asdict(memory) | {"total": memory.total, "fits": fit.cards(memory)}
            for method, memory in found.items()
        }
        integers = f" {config.integers}" if config.weights == "qlora" else ""
        return {
            "method": config.weights + integers + fit.OFFLOADED[config.compute.offload],
            "steps": self.steps,
            "data": {
                "rows_read": len(self.learn),
                "tokens": int(self.learn.lengths().sum()),
                "held_out": len(self.held) if self.held is not None else 0,
                "refused": self.report_of_data.dirty,
            },
            "memory_bytes": told,
            "memory_free_bytes": free_memory(self.ranks.device),
        }

    def preview(self, count: int) -> int:
        """Show samples, and what is learned of them, in colour."""
        from rich.console import Console

        from xverse.data.preview import show

        if self.ranks.first:
            show(self.learn, self.tokenizer, count, Console())
        return 0

    def train(self, stop: Stop, began: float, listener: Listener | None = None) -> Outcome:
        """Train, and write the result where the last step was reached."""
        record = {"config": dataclasses.asdict(self.config), "steps": self.steps}
        self.run = TrainingRun(
            self.out,
            self.options,
            self.ranks,
            record=record,
            quiet=self.config.json,
            listener=listener,
        )
        decoder = self._decoder()
        held = {} if self.held is None else {"held_out": Held(self._loader(self.held), 0.0)}
        return self.run.train(
            decoder,
            self._objective(),
            self.loader,
            self._publish,
            stop,
            validation=held,
            began=began,
        )

    def report(self) -> dict[str, object]:
        """Where the run stands, and where its time went."""
        assert self.run is not None, "it was trained"
        return self.run.report()

    def _samples(self) -> tuple[Samples | Pairs, Samples | Pairs | None, Report]:
        """What is learned from, what is held out, and what was refused."""
        config, aside = self.config, self.out / RUN
        keeps = self.ranks.first and not config.dry_run and not config.preview
        if keeps:
            aside.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = (
                stack.enter_context((aside / REFUSED).open("w", encoding="utf-8"))
                if keeps
                else None
            )
            report = Report(file)

            def read(data: tuple[str, ...]) -> Samples | Pairs:
                return read_samples(data, self.tokenizer, self.chat, config.read, report)

            learn = read(config.data)
            held = read(config.validation) if config.validation else None
        if held is None and config.held_out:
            learn, held = learn.split(config.held_out, config.seed)
        wanted = config.method == "dpo"
        for samples in (learn, held):
            if samples is not None and isinstance(samples, Pairs) is not wanted:
                raise _other_kind(wanted)
        return learn, held, report

    def _require_context(self) -> None:
        """Raise XverseError for a sample that is longer than what the model reads."""
        context = self.checkpoint.shape.max_position_embeddings
        longest = max(int(s.lengths().max()) for s in (self.learn, self.held) if s is not None)
        if longest > context:
            raise XverseError(
                f"A sample has {longest:,} tokens, and the model reads {context:,}.",
                "It has never seen a position beyond.",
                f"Cut the samples with --read.cutoff {context}.",
            )

    def _loader(self, samples: Samples | Pairs) -> Loader:
        config, grid = self.config, grid_of(self.ranks, self.config.mesh)
        return loader_of(
            samples,
            row_tokens=config.row_tokens,
            rows_per_step=config.rows_per_step,
            rows_per_pass=config.rows_per_pass,
            rank=grid.reader,
            ranks=grid.axes.readers,
            seed=config.seed,
            packing=config.packing,
        )

    def _decoder(self) -> Decoder:
        shape, weights = self.checkpoint.shape, self.config.weights
        if weights == "full":
            return build.continued(shape, self.folder, self.options, self.ranks)
        integers = self.config.integers if weights == "qlora" else None
        return build.adapted(
            shape, self.folder, self.options, self.ranks, self.config.lora, integers=integers
        )

    def _objective(self) -> Objective:
        config, shape = self.config, self.checkpoint.shape
        if config.method != "dpo":
            learn = functools.partial(objective.pretrain, z_factor=config.compute.z_loss)
            return noisy(learn, config.noise) if config.noise else learn
        if config.weights != "full":
            return functools.partial(objective.dpo, reference=switched_off, options=config.dpo)
        before = build.frozen(shape, self.folder, self.options, self.ranks)
        return functools.partial(
            objective.dpo,
            reference=lambda _decoder: contextlib.nullcontext(before),
            options=config.dpo,
        )

    def _publish(self, loop: Run) -> None:
        if self.config.weights != "full":
            publish_adapter(
                self.out,
                loop.optimizer.weights(),
                self.config.lora,
                self.ranks,
                base_model=self.config.model,
                chat_format=self.chat.name,
            )
            return
        publish(
            self.out,
            self.checkpoint.shape,
            loop.optimizer.weights(),
            self.tokenizer,
            self.ranks,
            dtype=build.dtype_of(self.config.compute, self.ranks),
            chat=self.chat,
            generation=self.checkpoint.generation_config,
            trained={"steps": loop.step, "tokens": loop.tokens, "from": self.config.model},
        )


def _model_folder(model: str) -> Path:
    folder = resolve(model)
    if folder.is_file():
        raise XverseError(
            f"{model} is a GGUF file, and training begins with a model folder.",
            "Its weights may be rounded, and what comes of it has the layout of a folder.",
            "Convert it first: xverse export FILE FOLDER.",
        )
    return folder


def _other_kind(wanted: bool) -> XverseError:
    if wanted:
        return XverseError(
            "There are no pairs to prefer by.",
            "--method dpo learns from a chosen and a rejected answer to the same, and the data has "
            "one answer each.",
            "Give preference data, or take --method lora.",
        )
    return XverseError(
        "The data are pairs of answers, a chosen and a rejected one.",
        "They are learned from with --method dpo.",
        "Add --method dpo, or give data with one answer each.",
    )
