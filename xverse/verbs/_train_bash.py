"""PUBLISHED ARGUMENTS -> FINE-TUNING. What the guides' `src/train_bash.py` takes, each one told."""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from xverse.config import nearest
from xverse.data.sample_options import SampleOptions
from xverse.device import env, num_cores
from xverse.errors import XverseError
from xverse.files import read_json
from xverse.parallel.axes import Axes
from xverse.train.deepspeed import Asked, Mapped, read_deepspeed
from xverse.train.options import Computing, Keeping, Updating, Watching
from xverse.train.tuning import TARGETS, Dpo, Lora
from xverse.verbs.finetune import Config, tune

HELD_OUT = 0.01  # where evaluations are asked for and nothing says of what
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")

# Argument -> (kind, default, what it becomes here). A flag is a bool; "" is: as it says.
ARGUMENTS: dict[str, tuple[Any, Any, str]] = {
    "stage": (("sft", "dpo"), "sft", ""),
    "model_name_or_path": (str, None, ""),
    "do_train": (bool, False, ""),
    "dataset": (str, None, ""),
    "dataset_dir": (str, "data", "where dataset_info.json lies"),
    "template": (str, "", "the chat format; none: the model's own"),
    "finetuning_type": (("full", "lora"), "lora", ""),
    "lora_target": (str, "all", ""),
    "lora_rank": (int, 8, ""),
    "lora_alpha": (float, None, "none: twice the rank"),
    "lora_dropout": (float, 0.0, ""),
    "use_rslora": (bool, False, ""),
    "use_dora": (bool, False, ""),
    "quantization_bit": (int, None, "adapters beside integers of so many bits (QLoRA)"),
    "pref_beta": (float, 0.1, "beta of DPO"),
    "dpo_beta": (float, None, "beta of DPO, by its older name"),
    "output_dir": (str, None, ""),
    "overwrite_output_dir": (bool, False, "a run that is there is removed; else it goes on"),
    "overwrite_cache": (bool, False, "nothing: no encoded data is kept between runs"),
    "per_device_train_batch_size": (int, 8, "rows of a pass"),
    "per_device_eval_batch_size": (int, 8, "nothing: evaluations take training's rows of a pass"),
    "gradient_accumulation_steps": (int, 1, "passes of a step"),
    "preprocessing_num_workers": (int, 1, "processes that encode, as many as there are cores"),
    "lr_scheduler_type": (SCHEDULES, "cosine", ""),
    "warmup_steps": (int, 0, ""),
    "warmup_ratio": (float, 0.0, "share of the steps that warm up"),
    "logging_steps": (int, 10, ""),
    "save_strategy": (("steps", "no"), "steps", "no: the last step alone is saved"),
    "save_steps": (int, 500, ""),
    "save_total_limit": (int, 2, "checkpoints that are kept"),
    "eval_strategy": (("no", "steps"), "no", ""),
    "eval_steps": (int, None, "none: logging_steps"),
    "val_size": (float, 0.0, "share (from 1 on: rows) that is held out"),
    "learning_rate": (float, 5e-5, ""),
    "weight_decay": (float, 0.0, ""),
    "adam_beta1": (float, 0.9, ""),
    "adam_beta2": (float, 0.999, ""),
    "adam_epsilon": (float, 1e-8, ""),
    "max_grad_norm": (float, 1.0, ""),
    "num_train_epochs": (float, 3.0, ""),
    "max_steps": (int, -1, "-1: by epochs"),
    "load_best_model_at_end": (bool, False, "the weights of the least eval_loss are the result"),
    "plot_loss": (bool, False, "training_loss.png and training_eval_loss.png"),
    "bf16": (bool, False, ""),
    "fp16": (bool, False, "an error: bf16 or fp32 are there"),
    "padding_side": (("right", "left"), "right", "nothing: rows are flat, without padding"),
    "cutoff_len": (int, 1024, "tokens of a sample at most"),
    "max_samples": (int, None, "rows of each data set at most"),
    "packing": (bool, False, "several samples in a row, none of which sees another"),
    "train_on_prompt": (bool, False, ""),
    "mask_history": (bool, False, ""),
    "neftune_noise_alpha": (float, 0.0, ""),
    "gradient_checkpointing": (bool, False, "blocks are computed again in the backward pass"),
    "deepspeed": (str, None, "see the second table"),
    "local_rank": (int, -1, "nothing: torchrun says it in the environment"),
    "seed": (int, 42, ""),
    "dry_run": (bool, False, "everything is resolved, nothing trained"),
}
REQUIRED = ("model_name_or_path", "dataset", "output_dir")
RENAMED = {"evaluation_strategy": "eval_strategy"}


class _Parser(argparse.ArgumentParser):
    """Names an argument that is not known, and the nearest one that is."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            name = unknown.split()[0].lstrip("-").split("=")[0]
            message = f"{message}.{nearest(name, ARGUMENTS)}"
        super().error(message)


def main(args: Sequence[str] | None = None) -> int:
    """Fine-tune as the published command asks. Exit codes as `xverse finetune`; 2: misused."""
    words = list(sys.argv[1:] if args is None else args)
    try:
        given = [word[2:].split("=")[0] for word in words if word.startswith("--")]
        return _train(_parse(words), given)
    except XverseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="train_bash.py", allow_abbrev=False)
    for name, (kind, default, became) in ARGUMENTS.items():
        flags = [f"--{name}", *(f"--{old}" for old, new in RENAMED.items() if new == name)]
        more: dict[str, Any] = {"default": default, "help": became, "dest": name}
        if kind is bool:
            # As transformers has it: `--bf16`, and also `--bf16 True`.
            more |= {"nargs": "?", "const": True, "type": _truth}
        elif isinstance(kind, tuple):
            more["choices"] = kind
        else:
            more["type"] = kind
        parser.add_argument(*flags, required=name in REQUIRED, **more)
    return parser.parse_args(list(words))


def _truth(word: str) -> bool:
    if word.lower() in ("true", "1", "yes"):
        return True
    if word.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")


def _train(asked: argparse.Namespace, given: Sequence[str]) -> int:
    if not asked.do_train:
        raise XverseError("There is nothing to do.", "--do_train is not given.", "Add --do_train.")
    if asked.fp16:
        raise XverseError(
            "Training in fp16 is not built.",
            "Its range needs loss scaling; bf16 has the range of fp32.",
            "Take --bf16, or neither for fp32.",
        )
    ranks, first = int(env("WORLD_SIZE", "1")), env("RANK", "0") == "0"
    mapped = _deepspeed(asked, ranks)
    config = config_of(asked, mapped, ranks)
    if first:
        _print_tables(asked, given, mapped, config)
        if asked.overwrite_output_dir and not asked.dry_run:
            shutil.rmtree(Path(config.out) / "run", ignore_errors=True)
    if asked.dry_run:
        return tune(config)
    return _listened(config, asked, ranks, first)


def _listened(config: Config, asked: argparse.Namespace, ranks: int, first: bool) -> int:
    """The run, with the files that users' scripts read beside it."""
    if not first:
        return tune(config)
    from xverse.train.trainer_log import TrainerLog

    listeners: list[TrainerLog] = []

    def listener(steps: int, steps_per_epoch: float) -> Callable[[Any], None]:
        listeners.append(
            TrainerLog(
                Path(config.out).expanduser(),
                steps=steps,
                steps_per_epoch=steps_per_epoch,
                every=asked.logging_steps,
                rows_per_step=config.rows_per_step,
            )
        )
        return listeners[0]

    code = tune(config, listener)
    if code == 0:
        listeners[0].finish()
        if asked.plot_loss:
            listeners[0].plot()
    return code


def _deepspeed(asked: argparse.Namespace, ranks: int) -> Mapped | None:
    if asked.deepspeed is None:
        return None
    return read_deepspeed(
        read_json(Path(asked.deepspeed)),
        Asked(
            ranks=ranks,
            rows_per_pass=asked.per_device_train_batch_size,
            passes=asked.gradient_accumulation_steps,
            clip=asked.max_grad_norm,
            bf16=asked.bf16,
            learning_rate=asked.learning_rate,
            betas=(asked.adam_beta1, asked.adam_beta2),
            epsilon=asked.adam_epsilon,
            weight_decay=asked.weight_decay,
        ),
    )


def config_of(asked: argparse.Namespace, mapped: Mapped | None, ranks: int) -> Config:
    """The options of `xverse finetune` that the arguments mean, for so many processes."""
    weights: Any = asked.finetuning_type
    if asked.quantization_bit is not None:
        weights = _quantized(asked)
    beta = asked.pref_beta if asked.dpo_beta is None else asked.dpo_beta
    pairs = 2 if asked.stage == "dpo" else 1
    workers = min(asked.preprocessing_num_workers, num_cores())
    return Config(
        model=asked.model_name_or_path,
        data=tuple(name.strip() for name in asked.dataset.split(",")),
        out=asked.output_dir,
        method="dpo" if asked.stage == "dpo" else weights,
        integers="int8" if asked.quantization_bit == 8 else "int4",
        format=asked.template,
        epochs=asked.num_train_epochs,
        steps=max(0, asked.max_steps),
        warmup_share=asked.warmup_ratio,
        row_tokens=asked.cutoff_len * pairs,
        rows_per_pass=asked.per_device_train_batch_size,
        rows_per_step=asked.per_device_train_batch_size * asked.gradient_accumulation_steps * ranks,
        packing=asked.packing,
        held_out=_held_out(asked),
        noise=asked.neftune_noise_alpha,
        seed=asked.seed,
        dry_run=asked.dry_run,
        read=SampleOptions(
            cutoff=asked.cutoff_len,
            train_on_prompt=asked.train_on_prompt,
            mask_history=asked.mask_history,
            max_samples=asked.max_samples,
            dataset_dir=asked.dataset_dir,
            workers=workers if workers > 1 else 0,
        ),
        lora=Lora(
            rank=asked.lora_rank,
            alpha=asked.lora_alpha or 2.0 * asked.lora_rank,
            dropout=asked.lora_dropout,
            targets=TARGETS if asked.lora_target == "all" else tuple(asked.lora_target.split(",")),
            rslora=asked.use_rslora,
            dora=asked.use_dora,
        ),
        dpo=Dpo(weights=weights, beta=beta),
        update=_updating(asked),
        compute=Computing(
            dtype="bfloat16" if asked.bf16 else "float32",
            recompute="full" if asked.gradient_checkpointing else "none",
            reshard=mapped is None or mapped.reshard,
            offload="none" if mapped is None else mapped.offload,
            pin_memory=mapped is None or mapped.pinned,
        ),
        keep=_keeping(asked),
        watch=Watching(spike=0.0),
        mesh=Axes(data=1 if mapped is None else mapped.data),
    )


def _quantized(asked: argparse.Namespace) -> str:
    if asked.quantization_bit not in (4, 8) or asked.finetuning_type != "lora":
        raise XverseError(
            f"--quantization_bit {asked.quantization_bit} with --finetuning_type "
            f"{asked.finetuning_type} cannot be.",
            "Adapters learn beside integers of 4 or 8 bits; integers themselves do not.",
            "Take 4 or 8, and --finetuning_type lora.",
        )
    return "qlora"


def _held_out(asked: argparse.Namespace) -> float:
    evaluates = asked.eval_strategy == "steps" or asked.load_best_model_at_end
    share = float(asked.val_size)
    if evaluates and not share:
        return HELD_OUT
    return share if evaluates else 0.0


def _updating(asked: argparse.Namespace) -> Updating:
    """As transformers steps: the schedule begins at 0, and ends at a rate of zero."""
    kind = asked.lr_scheduler_type
    return Updating(
        learning_rate=asked.learning_rate,
        schedule="constant" if kind.startswith("constant") else kind,
        first_step=0,
        warmup_steps=asked.warmup_steps,
        lowest_share=0.0,
        weight_decay=asked.weight_decay,
        beta1=asked.adam_beta1,
        beta2=asked.adam_beta2,
        epsilon=asked.adam_epsilon,
        clip=asked.max_grad_norm,
    )


def _keeping(asked: argparse.Namespace) -> Keeping:
    never = 2**62  # but for the last step, which always is
    return Keeping(
        save_every=asked.save_steps if asked.save_strategy == "steps" else never,
        keep=asked.save_total_limit,
        evaluate_every=asked.eval_steps or asked.logging_steps,
        evaluate_rows=0,
        log_every=asked.logging_steps,
        best=asked.load_best_model_at_end,
    )


def _print_tables(
    asked: argparse.Namespace, given: Sequence[str], mapped: Mapped | None, config: Config
) -> None:
    """What every argument, and every key of DeepSpeed's file, became."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("argument", "value", "here", title="arguments")
    notes = {old: f"the same as --{new}, its name today" for old, new in RENAMED.items()}
    for name in given:
        known = RENAMED.get(name, name)
        became = notes.get(name) or ARGUMENTS[known][2] or "as it says"
        table.add_row(name, str(getattr(asked, known)), became)
    if config.held_out and not asked.val_size:
        became = "1 % is held out: evaluations are asked for, and nothing says of what"
        table.add_row("val_size", "(not given)", became)
    console.print(table)
    if mapped is not None:
        table = Table("key", "value", "here", title=asked.deepspeed)
        for row in mapped.rows:
            table.add_row(row.key, str(row.value), row.became)
        console.print(table)
