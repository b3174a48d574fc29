"""Train a tokenizer from text, or show what one is and how well it compresses."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from xverse import log
from xverse.device import num_cores
from xverse.errors import XverseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xverse.data.report import Report
    from xverse.data.source import Text
    from xverse.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse tokenizer` takes."""

    action: Annotated[Literal["train", "show"], tyro.conf.Positional]
    """train: learn one from FILES. show: the first path is a tokenizer, texts may follow."""
    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files or folders: .txt, .jsonl, .parquet, the first two also as .gz or .zst."""
    out: str | None = None
    """train: the new folder; it must not exist, or be empty."""
    vocab_size: int = 32_000
    """train: how many ids."""
    form: Literal["xverse", "improved"] = "xverse"
    """train: as published, or with tokens for runs of spaces, newlines and symbols."""
    coverage: float = 0.9995
    """train: this part of all characters get their own id; rarer ones are spelled in bytes."""
    than: str | None = None
    """show: another tokenizer, to compare with."""
    text_field: str = "text"
    """Field of a jsonl or parquet row that holds the text."""
    max_dirty: float = 0.01
    """Stop when more than this part of all lines can't be read."""
    threads: int = 0
    """Threads that count words; 0 is one for each core."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Do what `action` says."""
    log.setup("INFO")
    if not config.paths:
        raise XverseError(
            f"`xverse tokenizer {config.action}` needs a path.",
            "None is given.",
            "Name text files to train on, or a tokenizer to show.",
        )
    return _train(config) if config.action == "train" else _show(config)


def _train(config: Config) -> int:
    from xverse.data.report import Report
    from xverse.text.vocabulary import train_tokenizer

    out = _new_folder(config)
    report = Report(max_dirty=config.max_dirty)
    size = 0

    def texts() -> "Iterator[str]":
        nonlocal size
        for text in log.progress(_read(config, config.paths, report), total=None, label="reading"):
            size += len(text.text.encode())
            yield text.text

    started = time.monotonic()
    tokenizer = train_tokenizer(
        texts(),
        vocab_size=config.vocab_size,
        form=config.form,
        coverage=config.coverage,
        threads=config.threads or num_cores(),
    )
    seconds = time.monotonic() - started
    _check(report, config)
    tokenizer.save(out)
    facts: dict[str, Any] = {
        "folder": str(out),
        "form": config.form,
        "vocab_size": tokenizer.vocab_size,
        "documents": report.read,
        "dirty_lines": dict(report.reasons),
        "bytes": size,
        "seconds": round(seconds, 2),
    }
    if config.json:
        print(json.dumps(facts))
        return 0
    print(out)
    print(
        f"{tokenizer.vocab_size:,} ids from {report.read:,} documents, {size / 1e6:,.1f} MB, "
        f"in {seconds:.1f} s ({size / 1e6 / seconds:.1f} MB/s); {report.dirty:,} lines skipped",
        file=sys.stderr,
    )
    print(f"next: xverse tokenizer show {out} {config.paths[0]}", file=sys.stderr)
    return 0


def _new_folder(config: Config) -> Path:
    if config.out is None:
        raise XverseError(
            "There is nowhere to put the tokenizer.", "--out is not given.", "Add --out DIR."
        )
    out = Path(config.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise XverseError(f"{out} is there already.", "It is not empty.", "Name another folder.")
    return out


def _show(config: Config) -> int:
    from xverse.data.report import Report
    from xverse.text.compression import measure_compression
    from xverse.text.tokenizer import Tokenizer

    names = [config.paths[0], *([config.than] if config.than else [])]
    tokenizers = [Tokenizer.load(name) for name in names]
    facts: dict[str, Any] = {"tokenizer": names[0], "layout": layout(tokenizers[0])}
    if config.paths[1:]:
        facts["compression"] = {}
        for name, tokenizer in zip(names, tokenizers, strict=True):
            report = Report(max_dirty=config.max_dirty)
            texts = ((t.language, t.text) for t in _read(config, config.paths[1:], report))
            started = time.monotonic()
            measured = measure_compression(tokenizer, texts)
            seconds = time.monotonic() - started
            _check(report, config)
            facts["compression"][name] = {
                language: {
                    "bytes_per_token": round(found.bytes_per_token, 3),
                    "characters_per_token": round(found.characters_per_token, 3),
                    "tokens_per_word": found.tokens_per_word and round(found.tokens_per_word, 3),
                    "byte_tokens": round(found.byte_tokens / max(1, found.tokens), 5),
                }
                for language, found in measured.items()
            }
            rate = sum(found.bytes for found in measured.values()) / 1e6 / seconds
            facts.setdefault("megabytes_per_s", {})[name] = round(rate, 1)
    if config.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    _print(facts)
    if not config.paths[1:]:
        print(f"next: xverse tokenizer show {names[0]} FILES, for its compression", file=sys.stderr)
    else:
        print(f"next: xverse prepare FILES --tokenizer {names[0]} --out DIR", file=sys.stderr)
    return 0


def layout(tokenizer: "Tokenizer") -> dict[str, Any]:
    """What the ids of `tokenizer` are: how many of each sort, and the special tokens."""
    from xverse.text.spelling import BYTE_TOKEN

    tokens = tokenizer.backend.get_vocab(with_added_tokens=True)
    plain = {token: id for token, id in tokens.items() if id not in tokenizer.special_ids}
    in_bytes = [token for token in plain if BYTE_TOKEN.fullmatch(token)]
    single = [token for token in plain if len(token) == 1]
    named = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
    return {
        "vocab_size": tokenizer.vocab_size,
        "special": {
            token: id
            for token, id in sorted(tokens.items(), key=lambda item: item[1])
            if id in tokenizer.special_ids
        },
        "named": named,
        "single_characters": len(single),
        "merged": len(plain) - len(single) - len(in_bytes),
        "bytes": len(in_bytes),
        "form": tokenizer.config.get("xverse_form"),
    }


def _read(config: Config, paths: tuple[str, ...], report: "Report") -> "Iterator[Text]":
    from xverse.data.source import Reading, read_files

    return read_files(paths, Reading(text_field=config.text_field), report)


def _check(report: "Report", config: Config) -> None:
    from xverse.data.report import check_budget

    check_budget(report.read, report.reasons, config.max_dirty, "in all")


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    found = facts["layout"]
    console.print(f"[bold]{facts['tokenizer']}[/bold]", markup=True)
    console.print(f"{found['vocab_size']:,} ids: ", end="")
    sorts = {"special": len(found["special"]), **{k: found[k] for k in ("single_characters",)}}
    sorts |= {"merged": found["merged"], "bytes": found["bytes"]}
    console.print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorts.items()))
    for token, id in found["special"].items():
        roles = [role for role, name in found["named"].items() if name == token]
        console.print(f"  {id:>7} {token} {' '.join(roles)}", markup=False)
    for name, languages in facts.get("compression", {}).items():
        table = Table(title=f"{name} ({facts['megabytes_per_s'][name]} MB/s)", title_justify="left")
        table.add_column("language")
        for column in ("bytes a token", "characters a token", "tokens a word", "spelled in bytes"):
            table.add_column(column, justify="right")
        for language, row in languages.items():
            words = row["tokens_per_word"]
            table.add_row(
                language,
                f"{row['bytes_per_token']:.2f}",
                f"{row['characters_per_token']:.2f}",
                f"{words:.2f}" if words else "-",
                f"{row['byte_tokens']:.2%}",
            )
        console.print(table)
