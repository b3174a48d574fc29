"""DOCUMENTS -> DOCUMENTS. Our steps in datatrove's pipelines: read, clean, compare, tokenize."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.logging import logger as datatrove_logger
from numpy.typing import NDArray

from xverse.data.filters import why_dropped
from xverse.data.lock import hold
from xverse.data.near import shingles
from xverse.data.plan import Plan
from xverse.data.publish import publish
from xverse.data.report import Report, check_budget
from xverse.data.shard_writer import ShardWriter
from xverse.data.shards import Shard
from xverse.data.source import read_unit
from xverse.files import read_json, write_json
from xverse.text.tokenizer import Tokenizer

Documents = Iterable[Any]  # of datatrove's Document

BATCH = 64  # documents encoded at once
SIGNED = 1 << 14  # shingles hashed at once: 15 MB for 112 hashes

# What fails is raised, and told by us; datatrove's own lines are for those who call it.
datatrove_logger.disable("datatrove")


class Hold(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """First step of every pipeline: while this process works here, no other run may."""

    type, name = "XVERSE", "hold"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Take a share of the lock.

        Workers whose parent was killed finish what they do; till then, their files are theirs.
        """
        hold(self.work)


class Read(PipelineStep):  # type: ignore[misc]
    """The documents of this task's units that pass the filters."""

    type, name = "XVERSE", "read"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Read; what was skipped, dropped and kept is told in work/read/."""
        folder = self.plan.work / "read"
        folder.mkdir(exist_ok=True)
        dropped: Counter[str] = Counter()
        size = 0
        with _whole(folder / f"{rank:05d}.dirty.jsonl") as log:
            report = Report(log, self.plan.settings.max_dirty)
            for unit in self.plan.tasks[rank]:
                for text in read_unit(unit, self.plan.reading(unit), report):
                    size += len(text.text.encode())
                    if why := why_dropped(text.text, text.kind, self.plan.settings.limits):
                        dropped[why] += 1
                        continue
                    place = f"{unit.path}:{unit.line(text.number)}" if not unit.start else ""
                    labels = {"language": text.language, "kind": text.kind}
                    yield Document(text.text, id=place, metadata=labels)
        facts = {"read": report.read, "bytes": size, "dirty": dict(report.reasons)}
        write_json(folder / f"{rank:05d}.json", {**facts, "dropped": dict(dropped)})


class Keep(PipelineStep):  # type: ignore[misc]
    """Last step of the reading: the clean documents, one file a task."""

    type, name = "XVERSE", "keep"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        """Write work/clean/<task>.jsonl."""
        (self.work / "clean").mkdir(exist_ok=True)
        with _whole(self.work / "clean" / f"{rank:05d}.jsonl") as file:
            for document in data:
                labels = document.metadata
                row = [document.text, labels["language"], labels["kind"]]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Kept(PipelineStep):  # type: ignore[misc]
    """The clean documents of this task, in the order in which every stage numbers them."""

    type, name = "XVERSE", "kept"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Read work/clean/<task>.jsonl."""
        with (self.work / "clean" / f"{rank:05d}.jsonl").open(
            encoding="utf-8", newline="\n"
        ) as file:
            for number, line in enumerate(file):
                text, language, kind = json.loads(line)
                yield Document(text, id=str(number), metadata={"language": language, "kind": kind})


class Count(PipelineStep):  # type: ignore[misc]
    """Passes documents on, and tells how many there were."""

    type, name = "XVERSE", "count"

    def __init__(self, work: Path, label: str) -> None:
        super().__init__()
        self.work, self.label = work, label

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write work/<label>/<task>.json once all have passed."""
        number = 0
        for document in data:
            number += 1
            yield document
        (self.work / self.label).mkdir(exist_ok=True)
        write_json(self.work / self.label / f"{rank:05d}.json", {"documents": number})


class CheckDirt(PipelineStep):  # type: ignore[misc]
    """Between reading and all else: stops where too much of the whole input was dirty."""

    type, name = "XVERSE", "check dirt"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Raise XverseError where the budget is used up."""
        read, reasons = 0, Counter[str]()
        for file in sorted((self.plan.work / "read").glob("*[0-9].json")):
            facts: dict[str, Any] = read_json(file)
            read += facts["read"]
            reasons.update(facts["dirty"])
        where = f"listed in {self.plan.work / 'read'}"
        check_budget(read, reasons, self.plan.settings.max_dirty, where)


class Publish(PipelineStep):  # type: ignore[misc]
    """Last step of all: the shards of every task become one folder."""

    type, name = "XVERSE", "publish"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Publish."""
        publish(self.plan)


class NearSignature(MinhashDedupSignature):  # type: ignore[misc]
    """MinHash signatures over shingles that need no knowledge of the language."""

    def __init__(self, folder: str, config: MinhashConfig) -> None:
        # datatrove wants a language to cut words by; of this one's tokenizer, which is never
        # asked, it needs no further package.
        super().__init__(folder, config, language="ace_Arab")

    def get_shingles(self, text: str) -> NDArray[np.uint64]:
        """Shape (shingles, 1)."""
        return shingles(text).reshape(-1, 1)

    def get_signature(self, all_shingles: NDArray[np.uint64]) -> list[list[int]]:
        """The least of each hash, some shingles at a time: a long text has a million of them."""
        parts = [
            super(NearSignature, self).get_signature(all_shingles[start : start + SIGNED])
            for start in range(0, len(all_shingles), SIGNED)
        ]
        least: list[list[int]] = np.min(np.array(parts, np.uint64), axis=0).tolist()
        return least


class Tokenize(PipelineStep):  # type: ignore[misc]
    """Documents -> shards of this task, the held-out ones apart."""

    type, name = "XVERSE", "tokenize"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        """Write work/shards/<task>/, whole or not at all."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are what runs on all cores
        folder = self.plan.work / "shards" / f"{rank:05d}"
        aside = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        splits = {name: _Split(aside / name, self.plan) for name in ("train", "validation")}
        documents = iter(data)
        while batch := list(islice(documents, BATCH)):
            ids = splits["train"].tokenizer.encode_many([document.text for document in batch])
            for document, row in zip(batch, ids, strict=True):
                name = "validation" if self._is_held_out(document.text) else "train"
                splits[name].add(row, document)
        facts = {name: [shard.to_json() for shard in s.close()] for name, s in splits.items()}
        write_json(aside / "shards.json", dict(facts))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

    def _is_held_out(self, text: str) -> bool:
        """By the text alone: the same text is always on the same side."""
        chance = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        return chance < self.plan.settings.validation


class _Split:
    """One side of the corpus, as the task writes it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        folder.mkdir(parents=True)
        self.tokenizer = load_tokenizer(plan.settings.tokenizer)
        self._folder, self._most = folder, plan.settings.shard_tokens
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None

    def add(self, ids: list[int], document: Any) -> None:
        if self._writer is None:
            eos = self.tokenizer.eos_id
            assert eos is not None
            self._writer = ShardWriter(
                self._folder, len(self._shards), vocab_size=self.tokenizer.vocab_size, end_id=eos
            )
        size = len(document.text.encode())
        language, kind = document.metadata["language"], document.metadata["kind"]
        self._writer.add(ids, language=language, kind=kind, num_bytes=size)
        if self._writer.tokens >= self._most:
            self.close()

    def close(self) -> list[Shard]:
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
        return self._shards


@lru_cache(maxsize=1)
def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer, once a process."""
    return Tokenizer.load(path)


def text_of(document: Document) -> str:
    """What exact deduplication compares."""
    text: str = document.text
    return text


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A text file that appears under its name when all of it is written."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
