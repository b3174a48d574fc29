"""CORPUS -> IDS IN FILES -> DOCUMENTS. Real text for bench.train_gpu, where no tokenizer is.

`python -m bench.train_text DATA TOKENIZER OUT` writes OUT/streams.npz, the texts of each file of
DATA/corpus one behind another as one document, and OUT/lessons.npz, instructions and answers of
DATA/sft, of which the answers are to be learned.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

CORPUS = ("en-novels", "zh-classics", "ja-aozora", "code-multi", "de-laws")
CHARACTERS = 1_200_000  # of each
LESSONS = ("stanford-alpaca/alpaca_data.json", "alpaca-zh-20k/zh-data-part-00.json")
ANSWERS = 6_000  # of each
END = 3  # the published end of a text


class Text(NamedTuple):
    """Documents in one array, as a loader reads them; `says` are the ids that are to be said."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    says: NDArray[np.bool_]

    @classmethod
    def read(cls, file: Path) -> Self:
        with np.load(file) as held:
            return cls(held["ids"].astype(np.int32), held["starts"], held["says"])

    @classmethod
    def random(cls, vocabulary: int, lengths: Iterable[int], seed: int = 0) -> Self:
        """Where no text is: ids by chance, of which all are to be said."""
        starts = np.cumsum([0, *lengths])
        ids = np.random.default_rng(seed).integers(0, vocabulary, int(starts[-1]))
        return cls(ids.astype(np.int32), starts, np.ones(len(ids), dtype=np.bool_))

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    def document(self, index: int) -> NDArray[np.int32]:
        return self.ids[self.starts[index] : self.starts[index + 1]]

    def learned(self, index: int) -> NDArray[np.bool_]:
        return self.says[self.starts[index] : self.starts[index + 1]]

    def mean_document(self) -> float:
        """Of the document that a token is in, its length: what attention costs goes by it."""
        lengths = self.lengths().astype(np.float64)
        return float((lengths**2).sum() / lengths.sum())

    def fitting(self, row_tokens: int) -> Self:
        """Without documents that are longer than a row: of an answer no part is left out."""
        return self._part([n - 1 <= row_tokens for n in self.lengths()], self.lengths())

    def in_rows(self, row_tokens: int) -> Self:
        """Every document cut off where its last whole row ends, so that all rows are full."""
        kept = (self.lengths() - 1) // row_tokens * row_tokens + 1
        return self._part(kept > 1, kept)

    def _part(self, chosen: Iterable[bool], kept: NDArray[np.int64]) -> Self:
        """The chosen documents, of each as many ids as are kept."""
        spans = [
            np.arange(start, start + length)
            for start, length, take in zip(self.starts, kept, chosen, strict=False)
            if take
        ]
        places = np.concatenate(spans)
        starts = np.cumsum([0, *map(len, spans)])
        return type(self)(self.ids[places], starts, self.says[places])


def streams(data: Path) -> Iterator[list[tuple[str, bool]]]:
    for name in CORPUS:
        lines = (data / "corpus" / f"{name}.jsonl").read_text("utf-8").splitlines()
        text = "\n".join(json.loads(line)["text"] for line in lines)
        yield [(text[:CHARACTERS], True)]


def lessons(data: Path) -> Iterator[list[tuple[str, bool]]]:
    for name in LESSONS:
        rows: list[dict[str, Any]] = json.loads((data / "sft" / name).read_text("utf-8"))
        for row in rows[:ANSWERS]:
            asked = "\n".join(filter(None, (row["instruction"], row["input"])))
            yield [(f"Human: {asked}\n\nAssistant: ", False), (row["output"], True)]


def tokenized(documents: Iterable[list[tuple[str, bool]]], tokenizer: Tokenizer) -> Text:
    ids: list[int] = []
    says: list[bool] = []
    starts = [0]
    for parts in documents:
        for text, said in parts:
            found = tokenizer.encode(text, add_special_tokens=False).ids
            ids += found
            says += [said] * len(found)
        ids.append(END)
        says.append(True)
        starts.append(len(ids))
    return Text(np.array(ids, np.int32), np.array(starts), np.array(says))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json that `tokenizers` loads")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("streams", streams(args.data)), ("lessons", lessons(args.data))):
        text = tokenized(documents, tokenizer)
        np.savez_compressed(args.out / f"{name}.npz", **text._asdict())
        print(f"{name}: {text.documents:,} documents, {len(text.ids):,} ids")


if __name__ == "__main__":
    main()
