"""WHAT IS ASKED -> WHAT EACH TASK DOES. The plan of a preparation, kept beside its work."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from xverse.data.filters import Limits
from xverse.data.mixture import Mixture
from xverse.data.report import Unit
from xverse.data.shards import file_sha256
from xverse.data.source import Reading, find_files, plan_units
from xverse.errors import XverseError
from xverse.files import read_json, write_json

PLAN = "plan.json"
STATISTICS = "statistics.json"
MAX_TASKS = 1000  # Slurm's usual largest array


@dataclass(frozen=True)
class Settings:
    """All that decides what comes out; how many cores and machines there are does not."""

    tokenizer: str
    reading: Reading = field(default_factory=Reading)
    limits: Limits = field(default_factory=Limits)
    mixture: Mixture | None = None
    dedup: Literal["near", "exact", "none"] = "near"
    validation: float = 0.005
    max_dirty: float = 0.01
    shard_tokens: int = 1 << 27


@dataclass(frozen=True)
class Plan:
    """The tasks of one preparation: task i reads the units in `tasks[i]`, one after the other."""

    settings: Settings
    tasks: tuple[tuple[Unit, ...], ...]
    work: Path
    out: Path

    @classmethod
    def make(cls, paths: list[str], settings: Settings, out: Path) -> Self:
        """The plan for the corpus at `paths`: units in order, about the same number of bytes each.

        It depends on the files alone, so that every machine makes the same.
        """
        files = find_files(paths)
        if not files:
            raise XverseError(
                "There is no text to prepare.",
                f"No corpus file is in {', '.join(paths)}.",
                "Give files or folders with .txt, .jsonl or .parquet files, also as .gz or .zst.",
            )
        units = plan_units(files)
        count = -(-len(units) // MAX_TASKS)
        tasks = [tuple(units[start : start + count]) for start in range(0, len(units), count)]
        return cls(settings, tuple(tasks), out.with_name(f".{out.name}.work"), out)

    def reading(self, unit: Unit) -> Reading:
        """How `unit` is read."""
        mixture, reading = self.settings.mixture, self.settings.reading
        return mixture.reading_of(unit.path, reading) if mixture else reading

    def claim(self) -> Literal["new", "resumed", "done"]:
        """Make the work folder, or take it up again; "done" where `out` is this very preparation.

        Raises XverseError where `out` or the work folder is that of something else.
        """
        fingerprint = self.fingerprint()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            file = self.out / STATISTICS
            if file.is_file() and read_json(file).get("fingerprint") == fingerprint:
                return "done"
            raise XverseError(
                f"{self.out} is there already.",
                "Prepared shards are never written over.",
                "Name another folder, or delete that one.",
            )
        file = self.work / PLAN
        if file.exists():
            self._check_work(read_json(file).get("fingerprint") == fingerprint)
            return "resumed"
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise XverseError(
                f"{self.work} can't be made.", str(error), "Choose another --out."
            ) from error
        write_json(file, {"fingerprint": fingerprint})
        return "new"

    def _check_work(self, same: bool) -> None:
        if not same:
            raise XverseError(
                f"{self.work} holds another preparation.",
                "It was begun with other files, other options or another tokenizer.",
                f"Repeat that one to finish it, or delete {self.work} to begin anew.",
            )

    def fingerprint(self) -> str:
        """sha256 of the settings, the tokenizer, and name, size and time of every file."""
        facts: list[Any] = [json.loads(json.dumps(dataclasses.asdict(self.settings), default=str))]
        facts.append(file_sha256(tokenizer_file(self.settings.tokenizer)))
        for unit in (unit for task in self.tasks for unit in task):
            stat = unit.path.stat()
            facts.append([str(unit.path), unit.start, unit.end, stat.st_size, stat.st_mtime_ns])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json that `path` names, itself or by its folder."""
    given = Path(path).expanduser()
    return given / "tokenizer.json" if given.is_dir() else given
