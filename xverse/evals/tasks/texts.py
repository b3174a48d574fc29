"""TEXTS -> ITEMS. Perplexity of whole documents: .txt files, or the "text" of .jsonl files."""

from collections.abc import Iterator
from pathlib import Path

from xverse.evals.item import Item, Task
from xverse.evals.tasks.sentences import lines_of


def documents(folder: Path, shots: int) -> Iterator[Item]:
    """Every document below `folder`; its file is its group."""
    if shots:
        raise ValueError("documents have no examples")
    files = sorted(path for kind in ("*.txt", "*.jsonl") for path in folder.rglob(kind))
    if not files:
        raise FileNotFoundError(2, "no texts", str(folder / "*.txt"))
    for file in files:
        group = file.relative_to(folder).as_posix()
        texts = (
            [file.read_text("utf-8")]
            if file.suffix == ".txt"
            else [row["text"] for row in lines_of(file)]
        )
        for place, text in enumerate(texts):
            if text:
                yield Item(f"{group}/{place}", text, group)


TASKS = (Task("perplexity", "Perplexity", "text", documents, "perplexity"),)
