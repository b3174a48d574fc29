"""FOLDER -> DOCUMENTS OF IDS. Tokenized shards, memory-mapped; index.json says what they hold."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from xverse.errors import XverseError
from xverse.files import read_json

FORMAT = "xverse-shards-1"
INDEX = "index.json"
VALIDATION = "validation"  # a folder inside: what `xverse prepare` held out
SAMPLES = "samples"  # uint64: which stored document each one that is served is
PARTS = ("tokens", "offsets", "groups")  # the files of one shard
MAX_INDEX_BYTES = 1 << 30  # 1,000,000 shards
_NAME = re.compile(r"shard-\d{5,}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
DAMAGED = "Copy the folder again, or make it again with `xverse prepare`."


@dataclass(frozen=True)
class Group:
    """What a folder holds of one language and one kind of text."""

    language: str
    kind: str
    documents: int
    tokens: int  # with one end-of-text id a document
    bytes: int  # of UTF-8 text


@dataclass(frozen=True)
class Shard:
    """What index.json says of one shard; the codes in its .groups file count its own `groups`."""

    name: str
    documents: int
    tokens: int
    groups: tuple[Group, ...]
    sha256: Mapping[str, str]  # by the names in PARTS

    def to_json(self) -> dict[str, Any]:
        """The shard's entry in index.json."""
        groups = [[g.language, g.kind, g.documents, g.tokens, g.bytes] for g in self.groups]
        facts = {"documents": self.documents, "tokens": self.tokens}
        return {"name": self.name, **facts, "groups": groups, "sha256": dict(self.sha256)}

    @classmethod
    def from_json(cls, facts: Any) -> Self:
        """The entry read back; ValueError, TypeError or KeyError where it is malformed."""
        groups = tuple(
            Group(_text(language), _text(kind), *(_count(n) for n in counts))
            for language, kind, *counts in facts["groups"]
        )
        sums = {part: str(facts["sha256"][part]) for part in PARTS}
        shard = cls(
            str(facts["name"]), _count(facts["documents"]), _count(facts["tokens"]), groups, sums
        )
        if not _NAME.fullmatch(shard.name):  # it becomes a path
            raise ValueError(f"{shard.name!r} is no shard's name")
        if not all(_SHA256.fullmatch(digest) for digest in sums.values()):
            raise ValueError(f"a sha256 of {shard.name} is malformed")
        documents, tokens = sum(g.documents for g in groups), sum(g.tokens for g in groups)
        if (documents, tokens) != (shard.documents, shard.tokens) or tokens < documents:
            raise ValueError(f"the counts of {shard.name} contradict each other")
        return shard


class Shards:
    """Documents of ids in a folder, each ended by `end_id`; nothing is read before it is asked for.

    Where a mixture was drawn, the documents are those it chose, some of them more than once.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        """Take what index.json holds; use `Shards.open`."""
        self.folder = folder
        if index["format"] != FORMAT:
            raise ValueError(f"the format is {index['format']!r}, not {FORMAT!r}")
        self.shards = tuple(Shard.from_json(facts) for facts in index["shards"])
        self.tokenizer_sha256 = str(index["tokenizer_sha256"])
        self.vocab_size = _count(index["vocab_size"])
        self.end_id = _count(index["end_id"])
        self.dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[index["dtype"]])
        self.groups = total_groups(self.shards)
        self.stored_documents = sum(shard.documents for shard in self.shards)
        self.samples: Mapping[str, Any] | None = index.get("samples")
        served = self.samples or {
            "documents": self.stored_documents,
            "tokens": sum(shard.tokens for shard in self.shards),
        }
        self.documents, self.tokens = _count(served["documents"]), _count(served["tokens"])
        self._starts = np.cumsum([0, *(shard.documents for shard in self.shards)])
        self._check_sizes()

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> Self:
        """The shards in `folder`; `verify` compares every file with its sha256.

        Raises XverseError where index.json or a file is missing, malformed, or of another size.
        """
        path = Path(folder).expanduser()
        if not (path / INDEX).is_file():
            raise XverseError(
                f"There are no shards in {path}.",
                f"It has no {INDEX}.",
                "Make them from text with `xverse prepare`.",
            )
        try:
            shards = cls(path, read_json(path / INDEX, max_bytes=MAX_INDEX_BYTES))
            if verify:
                shards._check_hashes()
        except (KeyError, TypeError, ValueError, OSError) as error:
            why = f"{INDEX} lacks {error}." if isinstance(error, KeyError) else f"{error}."
            raise XverseError(f"The shards in {path} can't be used.", why, DAMAGED) from error
        return shards

    def document(self, index: int) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of document `index`, end-of-text id included: a read-only view of the mapped file."""
        shard, inside = self._place(index)
        tokens, offsets, _ = self._maps(shard)
        return tokens[int(offsets[inside]) : int(offsets[inside + 1])]

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, shape (documents,)."""
        parts = [np.diff(self._maps(i)[1].astype(np.int64)) for i in range(len(self.shards))]
        lengths = np.concatenate([np.zeros(0, np.int64), *parts])
        if (lengths < 1).any():
            raise XverseError(
                f"The shards in {self.folder} can't be used.",
                "An .offsets file does not rise from document to document.",
                DAMAGED,
            )
        return lengths if self._sample is None else lengths[self._sample]

    def group_codes(self) -> NDArray[np.uint16]:
        """Place in `groups` of every document, shape (documents,)."""
        parts = [self._local_codes(i)[self._maps(i)[2]] for i in range(len(self.shards))]
        codes = np.concatenate([np.zeros(0, np.uint16), *parts])
        return codes if self._sample is None else codes[self._sample]

    def group(self, index: int) -> Group:
        """The group that document `index` belongs to."""
        shard, inside = self._place(index)
        return self.groups[self._local_codes(shard)[self._maps(shard)[2][inside]]]

    def language(self, index: int) -> str:
        """Language of document `index`: an ISO 639-1 code, or a programming language."""
        return self.group(index).language

    def kind(self, index: int) -> str:
        """Kind of text that document `index` is: web, code, books, ..."""
        return self.group(index).kind

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, document inside it) of document `index`."""
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        stored = index if self._sample is None else int(self._sample[index])
        shard = int(np.searchsorted(self._starts, stored, side="right")) - 1
        return shard, stored - int(self._starts[shard])

    @cached_property
    def _sample(self) -> NDArray[np.uint64] | None:
        if self.samples is None:
            return None
        chosen = _map(self.folder / SAMPLES, np.dtype("<u8"), self.documents)
        if len(chosen) and int(chosen.max()) >= self.stored_documents:
            raise XverseError(
                f"The shards in {self.folder} can't be used.",
                f"{SAMPLES} names a document that is not there.",
                DAMAGED,
            )
        return chosen

    @cached_property
    def _mapped(self) -> dict[int, tuple[NDArray[Any], NDArray[np.uint64], NDArray[np.uint16]]]:
        return {}

    def _maps(self, shard: int) -> tuple[NDArray[Any], NDArray[np.uint64], NDArray[np.uint16]]:
        """Tokens, offsets and group codes of a shard, mapped when first used."""
        known = self._mapped.get(shard)
        if known is None:
            facts = self.shards[shard]
            path = self.folder / facts.name
            known = self._mapped[shard] = (
                _map(path.with_suffix(".tokens"), self.dtype, facts.tokens),
                _map(path.with_suffix(".offsets"), np.dtype("<u8"), facts.documents + 1),
                _map(path.with_suffix(".groups"), np.dtype("<u2"), facts.documents),
            )
        return known

    def _local_codes(self, shard: int) -> NDArray[np.uint16]:
        """From the codes in the shard's own file to places in `groups`."""
        places = {(group.language, group.kind): place for place, group in enumerate(self.groups)}
        own = [places[group.language, group.kind] for group in self.shards[shard].groups]
        return np.array(own, np.uint16)

    def _check_sizes(self) -> None:
        for shard in self.shards:
            counts = {"tokens": shard.tokens, "offsets": shard.documents + 1}
            sizes = {"tokens": self.dtype.itemsize, "offsets": 8, "groups": 2}
            for part in PARTS:
                path = self.folder / f"{shard.name}.{part}"
                size = sizes[part] * counts.get(part, shard.documents)
                if path.stat().st_size != size:
                    raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")
        if self.samples is not None:
            size = (self.folder / SAMPLES).stat().st_size
            if size != 8 * self.documents:
                raise ValueError(f"{SAMPLES} has {size} bytes, not {8 * self.documents}")

    def _check_hashes(self) -> None:
        sums = {f"{s.name}.{part}": s.sha256[part] for s in self.shards for part in PARTS}
        if self.samples is not None:
            sums[SAMPLES] = str(self.samples["sha256"])
        for name, digest in sums.items():
            if file_sha256(self.folder / name) != digest:
                raise ValueError(f"{name} is not what was written: its sha256 differs")


def total_groups(shards: Sequence[Shard]) -> tuple[Group, ...]:
    """The groups of all `shards` together, ordered by language and kind."""
    totals: dict[tuple[str, str], tuple[int, int, int]] = {}
    for group in (group for shard in shards for group in shard.groups):
        key = group.language, group.kind
        documents, tokens, size = totals.get(key, (0, 0, 0))
        totals[key] = documents + group.documents, tokens + group.tokens, size + group.bytes
    return tuple(Group(*key, *totals[key]) for key in sorted(totals))


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if count == 0:
        return np.zeros(0, dtype)  # an empty file can't be mapped
    # A plain array over the map: slicing np.memmap itself costs three times as much.
    return np.asarray(np.memmap(path, dtype, mode="r", shape=(count,)))


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no name")
    return value
