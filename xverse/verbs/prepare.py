"""Make tokenized shards of a corpus: read, filter, deduplicate, mix, tokenize."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from xverse import log
from xverse.device import num_cores

if TYPE_CHECKING:
    from xverse.data.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse prepare` takes."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files or folders: .txt, .jsonl, .parquet, the first two also as .gz or .zst."""
    tokenizer: str
    """Model folder or tokenizer.json that makes the ids."""
    out: str
    """The new folder; it must not exist, or be empty."""
    mixture: str | None = None
    """TOML file: how much of which language and kind, and which files are what."""
    text_field: str = "text"
    """Field of a jsonl or parquet row that holds the text."""
    txt: Literal["file", "paragraph", "line"] = "file"
    """What one document of a .txt file is."""
    language: str = "und"
    """Language of documents that name none (in a field `language` or `lang`)."""
    kind: str = "other"
    """Kind of documents that name none (in a field `kind` or `type`): web, code, books, ..."""
    dedup: Literal["near", "exact", "none"] = "near"
    """near: by MinHash, which finds copies with small changes, and exact ones."""
    min_characters: int = 50
    """Shorter documents are dropped."""
    max_repeated: float = 0.3
    """Drop documents of which more than this part stands in repeated lines."""
    min_letters: float = 0.5
    """Drop documents with fewer letters and digits among what is no white space (code: half)."""
    max_dirty: float = 0.01
    """Stop when more than this part of all lines can't be read."""
    validation: float = 0.005
    """Part of the documents to hold out, chosen by their hash."""
    workers: int = 0
    """Tasks at the same time; 0 is one for each core."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Who does the work: this machine, a Slurm cluster, or a Ray cluster."""
    slurm: dict[str, str] = field(default_factory=lambda: {"partition": "cpu", "time": "24:00:00"})
    """Options for Slurm, as pairs: partition cpu time 24:00:00."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Prepare, or go on where a run that was cut short stopped; print what came of it."""
    from xverse.data.pipeline import Execution, prepare

    log.setup("INFO")
    started = time.monotonic()
    plan = _plan(config)
    workers = config.workers or num_cores()
    slurm = config.slurm if config.executor == "slurm" else {}
    statistics = prepare(plan, Execution(config.executor, workers, slurm))
    seconds = time.monotonic() - started
    if statistics is None:
        facts = {"submitted": True, "work": str(plan.work), "folder": str(plan.out)}
        told = f"Slurm has it; when it is done, the shards are in {plan.out}."
        print(json.dumps(facts) if config.json else told)
        return 0
    if config.json:
        print(json.dumps({"folder": str(plan.out), "seconds": round(seconds, 1), **statistics}))
        return 0
    _print(plan, statistics, seconds)
    print(f"next: xverse pretrain {plan.out} --out DIR", file=sys.stderr)
    return 0


def _plan(config: Config) -> "Plan":
    from xverse.data.filters import Limits
    from xverse.data.mixture import Mixture
    from xverse.data.plan import Plan, Settings
    from xverse.data.source import Reading
    from xverse.text.tokenizer import Tokenizer

    Tokenizer.load(config.tokenizer)  # what is wrong with it is said before any work is done
    settings = Settings(
        tokenizer=config.tokenizer,
        reading=Reading(
            text_field=config.text_field,
            language=config.language,
            kind=config.kind,
            txt=config.txt,
        ),
        limits=Limits(
            min_characters=config.min_characters,
            max_repeated=config.max_repeated,
            min_letters=config.min_letters,
        ),
        mixture=Mixture.read(Path(config.mixture).expanduser()) if config.mixture else None,
        dedup=config.dedup,
        validation=config.validation,
        max_dirty=config.max_dirty,
    )
    return Plan.make(list(config.data), settings, Path(config.out).expanduser().absolute())


def _print(plan: "Plan", statistics: dict[str, Any], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    documents, tokens = statistics["documents"], statistics["tokens"]
    console.print(f"[bold]{plan.out}[/bold]")
    losses = {
        **{f"{name} (dirty lines)": count for name, count in statistics["dirty_lines"].items()},
        **documents["dropped"],
        **{f"{name} duplicates": count for name, count in documents["duplicates"].items()},
    }
    console.print(f"{documents['read']:,} documents read, {documents['kept']:,} kept")
    for name, count in losses.items():
        if count:
            console.print(f"  {count:>12,} {name}")
    console.print(f"{documents['validation']:,} held out for validation")
    table = Table("language", "kind", title_justify="left")
    for column in ("documents", "tokens", "bytes a token", "wanted", "epochs", "drawn"):
        table.add_column(column, justify="right")
    for group in statistics["groups"]:
        drawn = group["epochs"] * group["tokens"] / max(1, tokens["served"])
        table.add_row(
            group["language"],
            group["kind"],
            f"{group['documents']:,}",
            f"{group['tokens']:,}",
            f"{group['bytes'] / group['tokens']:.2f}",
            f"{group['wanted_share']:.1%}",
            f"{group['epochs']:.2f}",
            f"{drawn:.1%}",
        )
    console.print(table)
    rate = statistics["bytes_read"] / 1e6 / seconds
    console.print(
        f"{tokens['served']:,} tokens to train on, of {tokens['stored']:,} stored; "
        f"{seconds:.0f} s, {rate:.1f} MB/s"
    )
