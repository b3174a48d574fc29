"""OUTCOMES -> LINES ON DISK. What has been answered is never asked again, even after a kill."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from xverse.errors import XverseError
from xverse.evals.choice import Outcome
from xverse.files import write_json

HEAD, LINES = "run.json", "journal.jsonl"


class Journal:
    """The finished batches of one run, in a folder: each is a line, written whole or not at all."""

    def __init__(self, folder: Path, head: Mapping[str, object]) -> None:
        """Open or begin. `head` identifies what is asked and of whom; XverseError where the folder
        holds answers of another run."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / HEAD).exists():
                _require_same(folder, head)
            else:
                write_json(folder / HEAD, dict(head))
            self._file = folder / LINES
            self._known = self._read()
        except OSError as error:
            raise XverseError(
                f"The folder {str(folder)!r} cannot be used.",
                str(error),
                "Name another with --out.",
            ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> list[Outcome]:
        return self._known[key]

    def add(self, key: str, outcomes: Sequence[Outcome]) -> None:
        """Keep the outcomes of a batch; they are on the disk when this returns."""
        line = json.dumps([key, outcomes], ensure_ascii=False, separators=(",", ":"))
        try:
            with self._file.open("ab") as file:
                file.write(line.encode("utf-8", "surrogatepass") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise XverseError(
                f"{self._file} cannot be written.",
                str(error),
                "Make room on the disk and run the same command again: it goes on from here.",
            ) from error
        # As it will be read next time, so that both runs report the same.
        self._known[key] = json.loads(line)[1]

    def _read(self) -> dict[str, list[Outcome]]:
        """All whole lines; what a kill left of the last one is cut off."""
        if not self._file.exists():
            return {}
        raw = self._file.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self._file.open("r+b") as file:
                file.truncate(whole)
        try:
            pairs = [json.loads(line) for line in raw[:whole].splitlines()]
            return dict(pairs)
        except ValueError as error:
            raise XverseError(
                f"{self._file} is damaged.",
                str(error),
                "Delete the folder, or name another with --out, and begin anew.",
            ) from error


def _require_same(folder: Path, head: Mapping[str, object]) -> None:
    from xverse.files import read_json

    known = read_json(folder / HEAD)
    differing = sorted(key for key in {*known, *head} if known.get(key) != head.get(key))
    if differing:
        key = differing[0]
        raise XverseError(
            f"The folder {str(folder)!r} holds another run: {', '.join(differing)} differ.",
            f"There {key} is {known.get(key)!r:.120}, and now it is {head.get(key)!r:.120}.",
            "Name another folder with --out, or delete this one.",
        )
