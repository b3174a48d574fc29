"""Make a model smaller: weights in 8 or 4 bits, and a report of what that cost."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from xverse import log
from xverse.errors import XverseError

if TYPE_CHECKING:
    from xverse.checkpoint.shrink import Job
    from xverse.quant.recipe import Recipe

TABLE = ("int8", "int4", "int8-row", "int4-row")  # the last two are the published schemes
HELD_OUT = 10  # one sample in so many is kept to measure on, where no other text is given
MEASURED = 64  # rows of held-out text at most


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse quantize` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, GGUF file, alias or hub id; not quantized yet."""
    out: str | None = None
    """The new folder. A run that was stopped continues where it was."""
    to: Literal["int4", "int8", "int4-row", "int8-row", "fp8"] = "int4"
    """int4 and int8 have a scale for 128 columns each; -row one for each row, as published."""
    method: Literal["auto", "rtn", "search", "gptq", "awq"] = "auto"
    """rtn rounds to the nearest step, search seeks better scales, gptq and awq look at samples."""
    samples: str | None = None
    """Text or .jsonl (text, messages or conversations) to calibrate with, like the later use."""
    held_out: str | None = None
    """Text to measure quality on; without it a tenth of the samples, kept apart for that."""
    sample_count: int = 128
    """How many samples are taken from the file, evenly spread."""
    sample_length: int = 2048
    """Tokens of a sample, as far as the model's context goes."""
    group_size: int | None = None
    """Columns that share a scale: 128 (the usual), 64 or 32."""
    asymmetric: bool = False
    """Integers that need not lie around zero: a little better, a little larger."""
    head: Literal["int8", "int4", "none"] | None = None
    """The vocabulary head; int8 by itself at int4 and int8, else as it was."""
    embedding: Literal["int8", "int4"] | None = None
    """The input embedding (of some models also the head); else as it was."""
    table: bool = False
    """Write no folder, and print one table of the usual ways: memory and quality."""
    device: str = "auto"
    """Where blocks are computed, one at a time; cpu, cuda or cuda:N."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the quantized model computes in; auto is the source's own."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Write the folder whole or not at all, and print its report."""
    from xverse.checkpoint.shrink import quantize_folder
    from xverse.verbs._quantize_speed import measure_speed

    log.setup("INFO")
    _check(config)
    job = _job(config)
    if config.table:
        return _print_table(config, job)
    out = Path(str(config.out)).expanduser()
    report = quantize_folder(
        config.model,
        out,
        job,
        device=config.device,
        dtype=config.dtype,
        measure=lambda folder: measure_speed(config.model, folder, config.device, config.dtype),
    )
    if config.json:
        print(json.dumps({"folder": str(out), **report.to_json()}, ensure_ascii=False))
        return 0
    print(report.to_markdown())
    print(f"next: xverse chat {out}", file=sys.stderr)
    return 0


def recipe_of(config: Config) -> "Recipe":
    """The recipe that the options ask for. XverseError where they contradict each other."""
    from xverse.quant.recipe import Recipe
    from xverse.quant.scheme import Scheme

    recipe = Recipe.of(config.to)
    scheme = recipe.scheme
    if config.group_size is not None or config.asymmetric:
        if config.to not in ("int4", "int8"):
            raise XverseError(
                f"{config.to} has one scale for each row.",
                "Groups and asymmetric integers are for int4 and int8.",
                "Leave --group-size and --asymmetric out, or take --to int4.",
            )
        size = config.group_size or scheme.group_size
        scheme = replace(scheme, group_size=size, symmetric=not config.asymmetric)
    recipe = replace(recipe, scheme=scheme)
    if config.head is not None:
        ends = {"int8": Scheme(8), "int4": Scheme(4, scheme.group_size or 128), "none": None}
        recipe = replace(recipe, head=ends[config.head])
    if config.embedding is not None:
        tables = {"int8": Scheme(8), "int4": Scheme(4, scheme.group_size or 128)}
        recipe = replace(recipe, embedding=tables[config.embedding])
    return recipe


def _check(config: Config) -> None:
    if config.table and config.out is not None:
        raise XverseError(
            "--table writes no folder.", "It only compares.", "Leave --out or --table out."
        )
    if not config.table and config.out is None:
        raise XverseError(
            "There is no place to write to.",
            "The quantized model is a new folder.",
            "Name it: --out FOLDER.",
        )
    if config.table and config.samples is None and config.held_out is None:
        raise XverseError(
            "The table has nothing to measure quality on.",
            "It compares what each model says of the same text.",
            "Give --held-out FILE, or --samples FILE to calibrate as well.",
        )
    if config.sample_count < 1 or config.sample_length < 2:
        raise XverseError(
            "That is not a number of samples.",
            f"There are {config.sample_count} of {config.sample_length} tokens each.",
            "Give at least 1 of 2 tokens; 128 of 2048 are usual.",
        )
    if config.samples is not None and (config.method in ("rtn", "search") or config.to == "fp8"):
        raise XverseError(
            "This way of quantizing does not look at samples.",
            f"{config.to} by {config.method} rounds weights by themselves.",
            "Give the file as --held-out, to measure on, or take --to int4 --method gptq.",
        )


def _job(config: Config) -> "Job":
    from xverse.checkpoint.load import open_checkpoint
    from xverse.checkpoint.resolve import resolve
    from xverse.checkpoint.shrink import Job

    recipe = recipe_of(config)
    shape = open_checkpoint(resolve(config.model)).shape
    if shape.tie_word_embeddings and config.head in ("int8", "int4"):
        raise XverseError(
            "This model's head is its input embedding.",
            "One matrix serves as both, and has one scheme.",
            f"Use --embedding {config.head} instead of --head.",
        )
    if config.samples is None and config.held_out is None:
        return Job(recipe, config.method)
    samples = [] if config.samples is None else _rows(config, config.samples)
    if config.held_out is not None:
        held_out, text = _rows(config, config.held_out)[:MEASURED], Path(config.held_out).name
        return Job(recipe, config.method, samples, held_out, text)
    if len(samples) < 2:
        raise XverseError(
            f"{config.samples} is one sample alone.",
            "One in ten is kept to measure on, and there must be another to calibrate with.",
            "Give more text, a smaller --sample-length, or other text as --held-out.",
        )
    held_out = samples[HELD_OUT - 1 :: HELD_OUT] or samples[-1:]
    rest = [row for row in samples if not any(row is kept for kept in held_out)]
    text = f"{Path(str(config.samples)).name} (one sample in {HELD_OUT}, not calibrated with)"
    return Job(recipe, config.method, rest, held_out, text)


def _rows(config: Config, file: str) -> Sequence[Sequence[int]]:
    from xverse.checkpoint.load import open_checkpoint, open_tokenizer
    from xverse.checkpoint.resolve import resolve
    from xverse.text.samples import read_samples

    path = resolve(config.model)
    checkpoint = open_checkpoint(path)
    length = min(config.sample_length, checkpoint.shape.context_length)
    tokenizer = open_tokenizer(path)
    return read_samples(
        file, tokenizer, checkpoint.config, length=length, count=config.sample_count
    )


def _print_table(config: Config, job: "Job") -> int:
    """The usual recipes side by side, each with "auto" as its method."""
    from xverse.checkpoint.shrink import quantize_folder
    from xverse.quant.recipe import Recipe

    reports = {}
    for name in TABLE:
        # The published schemes are shown as they are: rounded to the nearest.
        method: Literal["auto", "rtn"] = "rtn" if name.endswith("-row") else "auto"
        asked = replace(job, recipe=Recipe.of(name), method=method)
        reports[name] = quantize_folder(
            config.model, None, asked, device=config.device, dtype=config.dtype
        )
    if config.json:
        print(json.dumps({name: report.to_json() for name, report in reports.items()}))
        return 0
    first = next(iter(reports.values()))
    assert first.quality is not None, "there is text to measure on"
    print("| | method | weights, MiB | perplexity | KL divergence | same likeliest token |")
    print("|---|---|---:|---:|---:|---:|")
    size, perplexity = first.source_bytes / 2**20, first.quality.perplexity_source
    print(f"| {first.source_dtype} | | {size:.1f} | {perplexity:.4g} | 0 | 100 % |")
    for name, report in reports.items():
        q = report.quality
        assert q is not None, "as above"
        print(
            f"| {name} | {report.method} | {report.bytes / 2**20:.1f} | {q.perplexity:.4g} "
            f"({100 * q.loss:+.2f} %) | {q.kl_divergence:.4g} | {100 * q.top1_agreement:.2f} % |"
        )
    print(f"\nOn {first.quality.tokens:,} tokens of {first.text}.")
    print(f"next: xverse quantize {config.model} --to int4 --out FOLDER", file=sys.stderr)
    return 0
