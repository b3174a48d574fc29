"""DOCUMENTS OF IDS -> FOLDER. Writes what shards.py reads, each file aside and then renamed."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xverse.data.shards import FORMAT, INDEX, PARTS, SAMPLES, Group, Shard, file_sha256
from xverse.files import write_json

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16: few files, and a damaged one is soon copied again


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that ids below `vocab_size` fit in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """One shard being written; as a context it is published when the block ends well."""

    def __init__(self, folder: Path, number: int, *, vocab_size: int, end_id: int) -> None:
        """Begin `folder`/shard-<number>; what lay under that name before is replaced."""
        assert 0 <= end_id < vocab_size
        self.name, self.end_id, self.vocab_size = f"shard-{number:05d}", end_id, vocab_size
        self.tokens = 0
        self._folder, self._dtype = folder, dtype_for(vocab_size)
        self._offsets, self._codes = [0], list[int]()
        self._groups: dict[tuple[str, str], list[int]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._aside("tokens").open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if error is not None:
            self._aside("tokens").unlink(missing_ok=True)

    def add(self, ids: ArrayLike, *, language: str, kind: str, num_bytes: int) -> None:
        """Append one document of `num_bytes` bytes of text; the end-of-text id is put behind it."""
        given = np.asarray(ids, np.int64)
        assert given.ndim == 1
        assert not len(given) or (given.min() >= 0 and given.max() < self.vocab_size)
        self._file.write(np.append(given, self.end_id).astype(self._dtype).tobytes())
        self.tokens += len(given) + 1
        self._offsets.append(self.tokens)
        counts = self._groups.setdefault((language, kind), [len(self._groups), 0, 0, 0])
        self._codes.append(counts[0])
        for place, more in enumerate((1, len(given) + 1, num_bytes), start=1):
            counts[place] += more

    def close(self) -> Shard:
        """Publish the shard's files, and tell what index.json shall say of it."""
        self._sync_and_close(self._file)
        parts = {"offsets": (self._offsets, "<u8"), "groups": (self._codes, "<u2")}
        for part, (values, dtype) in parts.items():
            with self._aside(part).open("wb") as file:
                file.write(np.array(values, dtype).tobytes())
                self._sync_and_close(file)
        sums = {part: file_sha256(self._aside(part)) for part in PARTS}
        for part in PARTS:
            self._aside(part).replace(self._folder / f"{self.name}.{part}")
        groups = tuple(Group(*key, *counts[1:]) for key, counts in self._groups.items())
        return Shard(self.name, len(self._codes), self.tokens, groups, sums)

    def _aside(self, part: str) -> Path:
        return self._folder / f"{self.name}.{part}.partial"

    @staticmethod
    def _sync_and_close(file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())  # a power cut must not leave a finished name on empty blocks
        file.close()


def write_samples(folder: Path, chosen: NDArray[np.uint64], tokens: int) -> dict[str, Any]:
    """Write which stored documents are served, in order; what index.json shall say of it."""
    aside = folder / f"{SAMPLES}.partial"
    with aside.open("wb") as file:
        file.write(chosen.astype("<u8").tobytes())
        ShardWriter._sync_and_close(file)
    facts = {"documents": len(chosen), "tokens": tokens, "sha256": file_sha256(aside)}
    aside.replace(folder / SAMPLES)
    return facts


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    *,
    tokenizer_sha256: str,
    vocab_size: int,
    end_id: int,
    samples: dict[str, Any] | None = None,
    **facts: object,
) -> None:
    """Write index.json, which makes the shards in `folder` readable; `facts` go in as they are."""
    totals = {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
    }
    index: dict[str, object] = {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "end_id": end_id,
        "dtype": dtype_for(vocab_size).name,
        **totals,
        "samples": samples,
        **facts,
        "shards": [shard.to_json() for shard in shards],
    }
    write_json(folder / INDEX, index)


def write_shards(
    folder: Path,
    documents: Iterable[tuple[ArrayLike, str, str]],
    *,
    vocab_size: int,
    end_id: int,
    tokenizer_sha256: str = "",
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write (ids, language, kind) of `documents` as shards of about `shard_tokens`, and the index.

    For ids that come from elsewhere than a corpus: bytes of text are counted as 0.
    """
    shards: list[Shard] = []
    waiting = iter(documents)
    document = next(waiting, None)
    while document is not None:
        with ShardWriter(folder, len(shards), vocab_size=vocab_size, end_id=end_id) as writer:
            while document is not None and writer.tokens < shard_tokens:
                ids, language, kind = document
                writer.add(ids, language=language, kind=kind, num_bytes=0)
                document = next(waiting, None)
            shards.append(writer.close())
    folder.mkdir(parents=True, exist_ok=True)
    write_index(
        folder, shards, tokenizer_sha256=tokenizer_sha256, vocab_size=vocab_size, end_id=end_id
    )
