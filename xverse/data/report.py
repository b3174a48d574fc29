"""DIRTY LINES -> A REPORT. What could not be read, or not whole: file, line and reason, counted."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TextIO

from xverse.errors import XverseError
from xverse.log import logger

SHOWN = 10  # the first ones are told at once; all of them stand in the file
BLOCK = 1 << 20
FREE = 100  # dirty lines that stop nothing, however few lines there were so far


@dataclass(frozen=True)
class Unit:
    """What is read in one go: a file, or the lines of a plain one that begin in [start, end)."""

    path: Path
    start: int = 0
    end: int | None = None

    def line(self, number: int) -> int:
        """Line of the file that is the unit's own line `number`, both from 1."""
        return number + self._lines_before

    @cached_property
    def _lines_before(self) -> int:
        """Lines before the first one that begins in the unit; read only when one is to be named."""
        count, left, last = 0, self.start, b"\n"
        if not left:
            return 0
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(BLOCK, left))):
                count += block.count(b"\n")
                left, last = left - len(block), block[-1:]
        return count if last == b"\n" else count + 1


@dataclass
class Report:
    """Counts of what was read and what was not; dirty lines go to `file` as JSON lines."""

    file: TextIO | None = None
    max_dirty: float = 1.0
    """Largest part of all lines that may be dirty; more of them, beyond FREE, stop the reading."""
    read: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    shortened: Counter[str] = field(default_factory=Counter)

    @property
    def dirty(self) -> int:
        """Lines that were skipped."""
        return self.reasons.total()

    def shorten(self, unit: Unit, number: int, how: str, detail: str = "") -> None:
        """Note that line `number` of `unit` is read, but not to its end."""
        path, line = unit.path, unit.line(number)
        self.shortened[how] += 1
        if self.shortened.total() <= SHOWN:
            logger.warning("%s:%d: cut: %s (%s)", path, line, how, detail)
        if self.file is not None:
            entry = {"file": str(path), "line": line, "cut": how, "detail": detail}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def skip(self, unit: Unit, number: int, reason: str, detail: str = "") -> None:
        """Note that line `number` of `unit` is skipped; XverseError where the budget is used up."""
        path, line = unit.path, unit.line(number)
        self.reasons[reason] += 1
        told = f"{reason} ({detail})" if detail else reason
        if self.dirty <= SHOWN:
            logger.warning("%s:%d: skipped: %s", path, line, told)
        if self.file is not None:
            entry = {"file": str(path), "line": line, "reason": reason, "detail": detail}
            self.file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self.dirty > FREE:
            check_budget(self.read, self.reasons, self.max_dirty, f"the last one at {path}:{line}")


def check_budget(read: int, reasons: Mapping[str, int], max_dirty: float, where: str) -> None:
    """Raise XverseError where more than `max_dirty` of all lines were dirty."""
    dirty = sum(reasons.values())
    if dirty <= max_dirty * (read + dirty):
        return
    most = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
    raise XverseError(
        "Too many lines of the input are dirty.",
        f"{dirty:,} of {read + dirty:,} were skipped ({most}), {where}.",
        f"Mend the input, or allow more than {max_dirty:g} of it with --max-dirty.",
    )
