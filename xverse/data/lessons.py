"""DATA SETS -> SAMPLES. Files read and rows taught, here or in processes, into one table."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from xverse.data.dataset_info import DataSet, find_data_sets
from xverse.data.layout import Layout, layout_of, layout_seen
from xverse.data.report import Report, Unit
from xverse.data.rows import Row, read_rows, row_format
from xverse.data.sample_options import SampleOptions
from xverse.data.samples import Growing, Pairs, Samples
from xverse.data.source import Reading, read_unit
from xverse.data.teacher import Outcome, Teacher
from xverse.errors import XverseError
from xverse.log import logger
from xverse.text.message import ChatFormat
from xverse.text.tokenizer import Tokenizer

CHUNK = 256  # rows that a worker takes at once
AHEAD = 4  # chunks for each worker that wait, so that memory does not hold all rows


def read_samples(
    data: Sequence[str | Path],
    tokenizer: Tokenizer,
    chat: ChatFormat,
    options: SampleOptions,
    report: Report,
) -> Samples | Pairs:
    """All samples of the data sets, or all pairs where they hold preferences.

    `data` names files, folders, or data sets of a dataset_info.json. Rows that cannot be learned
    from, and those that are cut, go to `report` with file, line and reason. Raises XverseError
    where nothing is left, or where some data sets are pairs and some are not.
    """
    teacher = Teacher(tokenizer, chat, options)
    growing = Growing()
    rankings: dict[bool, str] = {}
    rows_read = 0
    with _classroom(teacher, options.workers) as classroom:
        for data_set in find_data_sets(data, options.dataset_dir):
            for unit, layout, rows in _tables(data_set, options, report):
                rankings.setdefault(layout.ranking, data_set.name)
                for row, outcome in classroom.taught(rows, layout):
                    _note(report, unit, row, outcome)
                    growing.add(outcome.samples, rows_read)
                    rows_read += 1
    if len(rankings) > 1:
        raise XverseError(
            "Pairs and single answers can't be learned from at once.",
            f"{rankings[True]} holds pairs of answers, and {rankings[False]} does not.",
            "Learn from one kind after the other.",
        )
    if not len(growing):
        most = ", ".join(f"{count:,} {why}" for why, count in report.reasons.most_common())
        raise XverseError(
            "There is nothing to learn from.",
            f"Of no row a sample could be made: {most or 'there are no rows'}.",
            "Look at the reasons above, and mend the data.",
        )
    return growing.finish(pairs=True in rankings)


def _tables(
    data_set: DataSet, options: SampleOptions, report: Report
) -> Iterator[tuple[Unit, Layout, Iterator[Row]]]:
    """Every file of a data set: where its rows stand, how they are laid out, and the rows."""
    left = [limit for limit in (data_set.limit, options.max_samples) if limit is not None]
    budget = iter(range(min(left))) if left else None
    for file in data_set.files:
        unit = Unit(file)
        if not row_format(file):
            texts = read_unit(unit, Reading(), report)
            rows: Iterator[Row] = (Row({"text": text.text}, text.number) for text in texts)
            layout = layout_of("text", False)
        else:
            rows = read_rows(file, report)
            first = next(rows, None)
            if first is None:
                continue
            rows = _again(first, rows)
            layout = data_set.layout or layout_seen(first.value, str(file))
        logger.info("%s: %s", file, layout)
        yield unit, layout, rows if budget is None else _within(budget, rows)


def _again(first: Row, rows: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rows


def _within(budget: Iterator[int], rows: Iterator[Row]) -> Iterator[Row]:
    yield from (row for row, _ in zip(rows, budget, strict=False))


def _note(report: Report, unit: Unit, row: Row, outcome: Outcome) -> None:
    if outcome.refused:
        report.skip(unit, row.number, outcome.refused, outcome.detail)
        return
    if row_format(unit.path):  # texts have been counted when they were read
        report.read += 1
    if outcome.cut:
        report.shorten(unit, row.number, outcome.cut, outcome.detail)


class _Classroom:
    """Teaches rows in order, here or in processes."""

    def __init__(self, teacher: Teacher, pool: ProcessPoolExecutor | None, workers: int) -> None:
        self._teacher, self._pool, self._workers = teacher, pool, workers

    def taught(self, rows: Iterator[Row], layout: Layout) -> Iterator[tuple[Row, Outcome]]:
        """Every row and what became of it."""
        if self._pool is None:
            yield from ((row, self._teacher.teach(row.value, layout)) for row in rows)
            return
        waiting: deque[tuple[list[Row], Future[list[Outcome]]]] = deque()
        while chunk := list(islice(rows, CHUNK)):
            values = [row.value for row in chunk]
            waiting.append((chunk, self._pool.submit(_teach_there, values, layout)))
            if len(waiting) > AHEAD * self._workers:
                first, future = waiting.popleft()
                yield from zip(first, future.result(), strict=True)
        for first, future in waiting:
            yield from zip(first, future.result(), strict=True)


@contextmanager
def _classroom(teacher: Teacher, workers: int) -> Iterator[_Classroom]:
    if not workers:
        yield _Classroom(teacher, None, 0)
        return
    # Not forked: the process has threads, and perhaps a GPU.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_hire, initargs=(teacher,)) as pool:
        yield _Classroom(teacher, pool, workers)


def _hire(teacher: Teacher) -> None:
    _hired.append(teacher)


_hired: list[Teacher] = []  # of this process, if it is one of the pool's


def _teach_there(values: list[dict[str, Any]], layout: Layout) -> list[Outcome]:
    return [_hired[-1].teach(value, layout) for value in values]
