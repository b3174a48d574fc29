"""TEXT -> ONE FILE THAT TRAVELS. A tokenizer and shards of real text, packed for another machine.

Made by the product's own verbs: `xverse tokenizer train`, then `xverse prepare` with a mixture in
which small languages are drawn more often than they come.
"""

import json
import lzma
import shutil
import tarfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.data.shards import VALIDATION, Shards
from xverse.files import read_json, write_json
from xverse.verbs import prepare as prepare_verb
from xverse.verbs import tokenizer as tokenizer_verb

PACK = "real_run.tar.xz"
SHARDS, FACTS = "shards", "facts.json"
TEMPERATURE = 0.7  # the share of a language: its bytes to this power
MAX_EPOCHS = 3.0
HELD_OUT = 0.01
# Ids are pairs of bytes: with both of a pair known apart, xz saves a tenth more.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]


def make(out: Path, texts: Sequence[Path], *, vocabulary: int, planned_tokens: int) -> Path:
    """OUT/real_run.tar.xz of the jsonl files in the folders `texts`, and a table of what it holds.

    `texts` have `text`, `lang` and `kind` in every line. What an earlier call made is made anew.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in ("tokenizer", SHARDS):
        shutil.rmtree(out / old, ignore_errors=True)
    names = tuple(str(folder) for folder in texts)
    tokenizer_verb.run(
        tokenizer_verb.Config(
            action="train",
            paths=names,
            out=str(out / "tokenizer"),
            vocab_size=vocabulary,
            form="improved",
        )
    )
    mixture = out / "mixture.toml"
    mixture.write_text(mixture_toml(sizes(texts)), "utf-8")
    began = time.monotonic()
    prepare_verb.run(
        prepare_verb.Config(
            data=names,
            tokenizer=str(out / "tokenizer"),
            out=str(out / SHARDS),
            mixture=str(mixture),
            validation=HELD_OUT,
        )
    )
    facts = facts_of(out / SHARDS, planned_tokens)
    write_json(out / FACTS, facts | {"prepare_s": round(time.monotonic() - began, 1)})
    pack = packed(out)
    tell(facts, pack)
    return pack


def sizes(texts: Sequence[Path]) -> dict[tuple[str, str], int]:
    """Bytes of text by kind and language."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for file in sorted(file for folder in texts for file in folder.glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                found[row["kind"], row["lang"]] += len(row["text"].encode())
    return dict(found)


def mixture_toml(found: dict[tuple[str, str], int]) -> str:
    """Kinds as they come; within each, languages by their bytes to the power of TEMPERATURE."""
    tables: dict[str, dict[str, float]] = {"kinds": defaultdict(float)}
    for (kind, language), size in found.items():
        tables["kinds"][kind] += size
        table = "code" if kind == "code" else "languages"
        tables.setdefault(table, {})[language] = round(size**TEMPERATURE)
    lines = [f"max_epochs = {MAX_EPOCHS}"]
    for name, shares in tables.items():
        lines += ["", f"[{name}]", *(f'"{key}" = {share}' for key, share in shares.items())]
    return "\n".join(lines) + "\n"


def facts_of(folder: Path, planned_tokens: int) -> dict[str, Any]:
    """What the shards hold by language, and how often a run of so many tokens reads it."""
    statistics: Any = read_json(folder / "statistics.json")
    served = statistics["tokens"]["served"]
    passes = planned_tokens / served
    held = {
        (group.language, group.kind): group for group in Shards.open(folder / VALIDATION).groups
    }
    rows = []
    for group in statistics["groups"]:
        aside = held.get((group["language"], group["kind"]))
        rows.append(
            {
                **{key: group[key] for key in ("language", "kind", "documents", "tokens")},
                "bytes_per_token": round(group["bytes"] / max(1, group["tokens"]), 3),
                "share": round(group["epochs"] * group["tokens"] / served, 4),
                "epochs": round(group["epochs"] * passes, 2),
                "held_out_bytes": aside.bytes if aside else 0,
            }
        )
    return {
        "languages": rows,
        "tokens_stored": statistics["tokens"]["stored"],
        "tokens_drawn": served,
        "planned_tokens": planned_tokens,
        "documents": statistics["documents"],
        "bytes_read": statistics["bytes_read"],
    }


def packed(out: Path) -> Path:
    """The shards and the facts in one file; tokenizer.json lies among the shards."""
    pack = out / PACK
    with lzma.open(pack, "wb", filters=FILTERS) as raw, tarfile.open(fileobj=raw, mode="w|") as tar:
        tar.add(out / SHARDS, SHARDS)
        tar.add(out / FACTS, FACTS)
    return pack


def tell(facts: dict[str, Any], pack: Path) -> None:
    """The table, for people."""
    for row in sorted(facts["languages"], key=lambda row: -row["share"]):
        print(
            f"{row['language']:<8} {row['kind']:<5} {row['tokens']:>12,} tokens "
            f"{row['bytes_per_token']:6.2f} bytes a token {row['share']:7.1%} of the run "
            f"{row['epochs']:6.1f} epochs, {row['held_out_bytes'] / 1e3:7.0f} kB held out"
        )
    print(
        f"{facts['tokens_stored']:,} tokens stored, {facts['tokens_drawn']:,} drawn; "
        f"{facts['planned_tokens'] / 1e6:,.0f} million are "
        f"{facts['planned_tokens'] / facts['tokens_drawn']:.1f} times that"
    )
    print(f"{pack}: {pack.stat().st_size / 2**20:.1f} MiB")


def unpacked(pack: Path, folder: Path) -> Path:
    """The folder of shards, unpacked on the first call."""
    place = folder / "data"
    if not (place / FACTS).exists():  # the last member
        began = time.monotonic()
        with tarfile.open(pack, "r:xz") as tar:
            tar.extractall(place, filter="data")
        print(f"unpacked in {time.monotonic() - began:.1f} s", flush=True)
    return place
