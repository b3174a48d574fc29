"""WORK -> FOLDER. What the tasks made becomes one folder of shards, by one rename."""

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xverse.data.mixture import Draw, draw, plan_draw
from xverse.data.plan import STATISTICS, Plan, tokenizer_file
from xverse.data.shard_writer import write_index, write_samples
from xverse.data.shards import PARTS, VALIDATION, Group, Shard, Shards
from xverse.errors import XverseError
from xverse.files import read_json, write_json
from xverse.text.tokenizer import Tokenizer

DIRTY = "dirty.jsonl"


def publish(plan: Plan) -> None:
    """Put `plan.out` in place: shards, tokenizer, validation/, dirty.jsonl, statistics.json.

    All is linked together aside first; if that was cut short, it is done anew. Raises XverseError
    where nothing is left to train on.
    """
    aside = plan.work / "out"
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer = Tokenizer.load(plan.settings.tokenizer)
    _copy_tokenizer(plan, aside)
    facts: dict[str, Any] = {
        "tokenizer_sha256": tokenizer.sha256(),
        "vocab_size": tokenizer.vocab_size,
        "end_id": tokenizer.eos_id,
    }
    train = _gather(plan, "train", aside)
    if not train:
        raise XverseError(
            "Nothing is left to train on.",
            _losses(plan),
            f"See {plan.work / 'read'}; loosen the filters, or give more text.",
        )
    write_index(aside, train, **facts)
    validation = _gather(plan, VALIDATION, aside / VALIDATION)
    write_index(aside / VALIDATION, validation, **facts)
    draws = _mix(plan, aside, facts)
    with (aside / DIRTY).open("wb") as together:
        for file in sorted((plan.work / "read").glob("*.dirty.jsonl")):
            together.write(file.read_bytes())
    write_json(aside / STATISTICS, _statistics(plan, aside, draws))
    if plan.out.is_dir():
        plan.out.rmdir()  # it is empty: `claim` saw to that
    aside.rename(plan.out)


def _gather(plan: Plan, split: str, folder: Path) -> list[Shard]:
    """Link the shards of all tasks into `folder`, numbered in the order of the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    for rank in range(len(plan.tasks)):
        made = plan.work / "shards" / f"{rank:05d}"
        entries: Any = read_json(made / "shards.json", max_bytes=1 << 28)[split]
        for entry in entries:
            shard = Shard.from_json(entry)
            named = dataclasses.replace(shard, name=f"shard-{len(shards):05d}")
            for part in PARTS:
                _link(made / split / f"{shard.name}.{part}", folder / f"{named.name}.{part}")
            shards.append(named)
    return shards


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _copy_tokenizer(plan: Plan, folder: Path) -> None:
    folder.mkdir(parents=True)
    file = tokenizer_file(plan.settings.tokenizer)
    names = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    shutil.copyfile(file, folder / "tokenizer.json")
    for name in names:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)


def _mix(plan: Plan, folder: Path, facts: dict[str, Any]) -> list[Draw]:
    """Draw the documents that the mixture asks for, and note them in the index."""
    mixture = plan.settings.mixture
    stored = Shards.open(folder)
    if mixture is None or not mixture.has_shares:
        return [Draw(group, group.tokens / stored.tokens, 1.0) for group in stored.groups]
    draws = plan_draw(mixture, stored.groups)
    lengths = stored.lengths()
    chosen = draw(draws, stored.group_codes(), lengths, mixture.seed)
    samples = write_samples(folder, chosen, int(lengths[chosen].sum()))
    write_index(folder, stored.shards, **facts, samples=samples, mixture=mixture.to_json())
    return draws


def _task_facts(plan: Plan, label: str) -> Iterator[dict[str, Any]]:
    for rank in range(len(plan.tasks)):
        yield read_json(plan.work / label / f"{rank:05d}.json")


def _losses(plan: Plan) -> str:
    dropped = Counter[str]()
    for facts in _task_facts(plan, "read"):
        dropped.update(facts["dirty"])
        dropped.update(facts["dropped"])
    told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    return f"Of all lines and documents, {told}." if told else "The files hold no documents."


def _statistics(plan: Plan, folder: Path, draws: list[Draw]) -> dict[str, Any]:
    """What came in, what fell out and why, what is left, and how much of it is drawn."""
    read = list(_task_facts(plan, "read"))
    dirty, dropped = Counter[str](), Counter[str]()
    for facts in read:
        dirty.update(facts["dirty"])
        dropped.update(facts["dropped"])
    documents = sum(facts["read"] for facts in read)
    clean = documents - dropped.total()
    distinct = sum(facts["documents"] for facts in _task_facts(plan, "distinct"))
    train, held_out = Shards.open(folder), Shards.open(folder / VALIDATION)
    kept = train.stored_documents + held_out.documents
    return {
        "fingerprint": plan.fingerprint(),
        "documents": {
            "read": documents,
            "dropped": dict(sorted(dropped.items())),
            "duplicates": {"exact": clean - distinct, "near": distinct - kept},
            "kept": kept,
            "validation": held_out.documents,
            "served": train.documents,
        },
        "dirty_lines": dict(sorted(dirty.items())),
        "bytes_read": sum(facts["bytes"] for facts in read),
        "tokens": {"stored": sum(s.tokens for s in train.shards), "served": train.tokens},
        "groups": [_group_facts(item) for item in draws],
    }


def _group_facts(item: Draw) -> dict[str, Any]:
    group: Group = item.group
    return {
        **dataclasses.asdict(group),
        "wanted_share": round(item.wanted, 6),
        "epochs": round(item.epochs, 4),
    }
