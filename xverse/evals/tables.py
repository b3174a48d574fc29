"""FIGURES + PUBLISHED FIGURES -> TABLES. Side by side, the best of each column marked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xverse.evals.tasks import all_tasks

CATEGORIES = ("Average", "STEM", "Social", "Humanities", "Others")


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; of `values` (None where there is none) the best are marked."""

    title: str
    head: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    footnotes: tuple[str, ...] = ()
    spoken: Mapping[tuple[int, int], str] | None = None  # cells that say more than their value
    ranked: bool = True  # whether more is better, down the column

    def best(self, column: int) -> float | None:
        """The highest of a column as it is printed, where several can be compared."""
        known = [round(row[column] or 0.0, 1) for row in self.values if row[column] is not None]
        return max(known) if self.ranked and len(known) > 1 else None

    def is_best(self, row: int, column: int) -> bool:
        """Whether this cell is the best of its column, as printed."""
        value = self.values[row][column]
        return value is not None and round(value, 1) == self.best(column)

    def cell(self, row: int, column: int) -> str:
        """The cell as it is printed: one decimal, as the model cards have it."""
        said = (self.spoken or {}).get((row, column))
        value = self.values[row][column]
        return said or ("" if value is None else f"{value:.1f}")


@cache
def published() -> dict[str, Any]:
    """The model cards' tables."""
    text = Path(__file__).with_name("published.json").read_text("utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def tables_of(report: Mapping[str, Any]) -> list[Table]:
    """Every published table of which the report has a column, and its two category tables."""
    figures = {figure["task"]: figure for figure in report["figures"]}
    name = str(report["model"]["model"])
    found = [
        _against(table, figures, name)
        for table in published()["tables"]
        if figures.keys() & {*table["columns"]}
    ]
    return [*found, *_categories(figures, name)]


def _against(table: Mapping[str, Any], figures: Mapping[str, Any], name: str) -> Table:
    known = all_tasks()
    columns: Sequence[str] = table["columns"]
    ours = tuple(figures[c]["value"] if c in figures else None for c in columns)
    spoken = {
        (0, place): f"{figure['value']:.1f} ± {figure['stderr']:.1f}"
        for place, column in enumerate(columns)
        if (figure := figures.get(column)) is not None
    }
    notes = [f"Published figures: {table['source']}."]
    notes += [
        f"{known[c].title}: {known[c].note}" for c in columns if c in figures and known[c].note
    ]
    return Table(
        table["title"],
        tuple(known[column].title for column in columns),
        (f"{name} (measured)", *table["rows"]),
        (ours, *(tuple(row) for row in table["rows"].values())),
        tuple(notes),
        spoken,
    )


def _categories(figures: Mapping[str, Any], name: str) -> Iterator[Table]:
    for task, rows in published()["categories"].items():
        if task not in figures:
            continue
        figure = figures[task]
        means = {key: each["value"] for key, each in figure["categories"].items()}
        means["Average"] = figure["value"]
        yield Table(
            f"{figure['title']} by category",
            CATEGORIES,
            (f"{name} (measured)", *rows),
            (
                tuple(means.get(key) for key in CATEGORIES),
                *(tuple(row[key] for key in CATEGORIES) for row in rows.values()),
            ),
            ("Published figures: README of XVERSE-7B.",),
        )
