"""REPORT -> TERMINAL. The tables of `xverse benchmark`, and what was measured on what."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from xverse.verbs._benchmark_report import Report

GIB = 2**30
MIB = 2**20


def show(report: Report) -> None:
    """Print everything a person wants to know; --json has the rest."""
    console = Console(highlight=False, markup=False)
    model, machine = report.model, report.machine
    weights = ", random weights" if model["random_weights"] else ""
    rounded = f", rounded to {model['quantize']} bits" if model["quantize"] else ""
    console.print(f"{model['title']}, {model['dtype']}{rounded}{weights}")
    console.print(f"on {machine['name']} ({machine['device']})")
    versions = machine["versions"]
    assert isinstance(versions, Mapping)
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    console.print(f"{report.date}  {report.command}")
    sound = report.sound
    verdict = f"correctness: {report.correctness['verdict']}"
    console.print(verdict, style=None if sound else "bold red")
    if not sound:
        console.print("Nothing was timed: how fast wrong answers come is of no interest.")
        return
    for name, facts in report.peers.items():
        assert isinstance(facts, Mapping)
        same = ""
        if "equal_ids" in facts:
            same = f"; of the same {facts['of_ids']} greedy ids the first {facts['equal_ids']}"
        console.print(f"peer {name}: {facts['computes']}{same}")
    console.print()
    for table in (_first_token, _latency, _speed, _waiting, _memory):
        console.print(table(report))
        console.print()


def _first_token(report: Report) -> Table:
    table = _table(
        "Time to first token, one request alone",
        "prompt tokens",
        "",
        "median ms",
        "p95 ms",
        "samples",
        "xverse is",
    )
    for row in report.first_token:
        table.add_row(
            str(row.prompt_tokens),
            row.who,
            _ms(row.median_s),
            _ms(row.p95_s),
            str(row.samples),
            _times(row.xverse_is_times_as_fast),
        )
    return table


def _latency(report: Report) -> Table:
    table = _table(
        "From token to token, one request alone",
        "prompt + new",
        "",
        "median ms",
        "p95 ms",
        "tokens/s",
        "of the floor",
        "xverse is",
    )
    for row in report.latency:
        floor = "" if row.share_of_floor is None else f"{100 * row.share_of_floor:.1f} %"
        table.add_row(
            f"{row.prompt_tokens} + {row.new_tokens}",
            row.who,
            _ms(row.gap_median_s),
            _ms(row.gap_p95_s),
            f"{row.tokens_per_s:,.1f}",
            floor,
            _times(row.xverse_is_times_as_fast),
        )
    return table


def _speed(report: Report) -> Table:
    table = _table(
        "Many requests: tokens a second, new ones and all with the prompts",
        "at once",
        "requests",
        "",
        "new",
        "all",
        "preempted",
        "reused",
        "xverse is",
    )
    for row in report.load:
        table.add_row(
            str(row.concurrency),
            str(row.requests),
            row.who,
            f"{row.output_tokens_per_s:,.1f}",
            f"{row.total_tokens_per_s:,.1f}",
            _count(row.preempted),
            _count(row.reused_tokens),
            _times(row.xverse_is_times_as_fast),
        )
    return table


def _waiting(report: Report) -> Table:
    table = _table(
        "Many requests: ms to the first token, and of each after it",
        "at once",
        "",
        "first",
        "p95",
        "each",
        "p95",
    )
    for row in report.load:
        table.add_row(
            str(row.concurrency),
            row.who,
            _ms(row.ttft_median_s),
            _ms(row.ttft_p95_s),
            _ms(row.tpot_median_s),
            _ms(row.tpot_p95_s),
        )
    return table


def _memory(report: Report) -> Table:
    facts: Mapping[str, Any] = report.memory
    table = _table("Memory of xverse", "", "", title_only=True)
    kv = f"{_size(facts['kv_bytes'])}, room for {facts['kv_tokens']:,} tokens"
    table.add_row("weights", _size(facts["weights_bytes"]))
    table.add_row("keys and values", kv)
    table.add_row("peak", _size(facts["peak_bytes"]))
    table.add_row("a token alone reads", f"{_size(facts['bytes_read_per_token'])} of weights")
    copied = facts["copy_bandwidth_bytes_per_s"] / 1e9
    table.add_row("copy bandwidth here", f"{copied:,.1f} GB/s")
    table.add_row("hence the floor", f"{facts['floor_tokens_per_s']:,.1f} tokens/s")
    return table


def _table(title: str, *columns: str, title_only: bool = False) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=not title_only,
        collapse_padding=True,
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "" else "right")
    return table


def _size(bytes: int) -> str:
    return f"{bytes / GIB:.2f} GiB" if bytes >= GIB else f"{bytes / MIB:.2f} MiB"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.2f}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"
