"""FIGURES -> FILES. The report as Markdown, CSV, JSON and HTML; the same input, the same bytes."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xverse.errors import XverseError
from xverse.evals.tables import Table, tables_of
from xverse.files import write_json

FILES = ("report.json", "report.md", "report.csv", "report.html")
HEAD = ("Task", "Result", "± stderr", "n", "Shots", "Seed", "Task hash", "Prompt hash", "Weights")
CSV_HEAD = (
    *("task", "part", "metric", "value", "stderr", "n", "shots", "seed", "chat", "reads"),
    *("task_hash", "prompt_hash", "weights_hash", "model"),
)
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .75rem;text-align:right;"
    "border-bottom:1px solid #8884}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}:root{color-scheme:light dark}"
)


def write_report(folder: Path, report: Mapping[str, Any], *, plots: bool = True) -> None:
    """Write the four files into `folder`, and with `plots` the pictures that they show."""
    images: list[str] = []
    if plots:
        from xverse.evals.plots import draw_all

        images = draw_all(folder / "plots", report)
    tables = tables_of(report)
    write_json(folder / "report.json", dict(report))
    write_text(folder / "report.csv", as_csv(report))
    write_text(folder / "report.md", as_markdown(report, tables, images))
    write_text(folder / "report.html", as_html(report, tables, images))


def rows_of(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of text for each figure, as `HEAD` names its cells."""
    weights = str(report["model"].get("weights", "unknown"))
    return [
        (
            figure["title"],
            f"{figure['value']:.2f}" + ("" if figure["stderr"] is not None else " (perplexity)"),
            "" if figure["stderr"] is None else f"{figure['stderr']:.2f}",
            str(figure["n"]),
            str(figure["shots"]),
            str(figure["seed"]),
            figure["task_hash"],
            figure["prompt_hash"],
            weights,
        )
        for figure in report["figures"]
    ]


def footnotes_of(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know of single figures: how they were asked, and what did not fit."""
    notes: list[str] = []
    for figure in report["figures"]:
        said = [figure["note"]] if figure["note"] else []
        if figure["reads"] == "letters":
            said.append("Answers were written and their letter read, not scored.")
        for key, what in (
            ("fewer_shots", "were asked with fewer examples, as not all fit the context"),
            ("cut", "lost their middle to fit the context"),
            ("too_long", "did not fit the context and count as wrong"),
        ):
            if figure[key]:
                said.append(f"{figure[key]} of {figure['n']} questions {what}.")
        if figure["details"]:
            values = (f"{key.replace('_', ' ')} {v:.4f}" for key, v in figure["details"].items())
            said.append(f"{', '.join(values)}.")
        if said:
            notes.append(f"{figure['title']}: {' '.join(said)}")
    return notes


def as_csv(report: Mapping[str, Any]) -> str:
    """A line for each task, category and group, with the hashes of the task."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    model = report["model"]
    for figure in report["figures"]:
        parts = {"all": figure, **figure["categories"], **figure["groups"]}
        for name, part in parts.items():
            facts = [figure[key] for key in ("shots", "seed", "chat", "reads")]
            hashes = [figure["task_hash"], figure["prompt_hash"], model.get("weights", "unknown")]
            measured = [part["value"], part["stderr"], part["n"]]
            writer.writerow(
                [figure["task"], name, figure["metric"], *measured, *facts, *hashes, model["model"]]
            )
    return text.getvalue()


def as_markdown(report: Mapping[str, Any], tables: Sequence[Table], images: Sequence[str]) -> str:
    """The report for people."""
    lines = [f"# {_md(report['model']['model'])}", "", *_facts(report["model"]), ""]
    lines += markdown_table(HEAD, rows_of(report))
    lines += [f"- {_md(note)}" for note in footnotes_of(report)]
    for table in tables:
        rows = [
            (_md(name), *(_bold(table, row, c) for c in range(len(table.head))))
            for row, name in enumerate(table.names)
        ]
        lines += ["", f"## {_md(table.title)}", "", *markdown_table(("Model", *table.head), rows)]
        lines += [f"- {_md(note)}" for note in table.footnotes]
    lines += ["", *(f"![{Path(image).stem}]({image})" for image in images)]
    return "\n".join(lines).rstrip() + "\n"


def as_html(report: Mapping[str, Any], tables: Sequence[Table], images: Sequence[str]) -> str:
    """The same as one page, which needs nothing but the pictures beside it."""
    name = html.escape(str(report["model"]["model"]))
    facts = ", ".join(_facts(report["model"]))
    body = [f"<h1>{name}</h1>", f"<p>{html.escape(facts)}</p>"]
    body.append(_html_table(HEAD, [[html.escape(c) for c in row] for row in rows_of(report)]))
    body.append(_html_notes(footnotes_of(report)))
    for table in tables:
        rows = [
            [html.escape(name), *(_strong(table, row, c) for c in range(len(table.head)))]
            for row, name in enumerate(table.names)
        ]
        body.append(f"<h2>{html.escape(table.title)}</h2>")
        body.append(_html_table(("Model", *table.head), rows) + _html_notes(table.footnotes))
    body += [f'<img src="{image}" alt="{Path(image).stem}">' for image in images]
    head = f'<meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
    joined = "\n".join(body)
    return f"<!doctype html>\n<html><head>{head}</head><body>\n{joined}\n</body></html>\n"


def _facts(model: Mapping[str, Any]) -> list[str]:
    return [f"{key.replace('_', ' ')} {value}" for key, value in model.items() if key != "model"]


def _bold(table: Table, row: int, column: int) -> str:
    cell = _md(table.cell(row, column))
    return f"**{cell}**" if table.is_best(row, column) else cell


def _strong(table: Table, row: int, column: int) -> str:
    cell = html.escape(table.cell(row, column))
    return f"<b>{cell}</b>" if table.is_best(row, column) else cell


def _md(text: object) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one; cells come escaped."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells come escaped."""
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _html_notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else ""


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    aside = file.with_name(f"{file.name}.partial")
    try:
        aside.write_text(text, "utf-8")
        aside.replace(file)
    except OSError as error:
        raise XverseError(
            f"{file} cannot be written.", str(error), "Check the disk's space and permissions."
        ) from error
