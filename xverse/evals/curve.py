"""REPORTS AT SEVERAL PRECISIONS -> ONE TABLE. What rounding a model costs, and what it saves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xverse.errors import XverseError
from xverse.evals.report import markdown_table
from xverse.evals.tables import published
from xverse.files import read_json

Row = dict[str, Any]


def rows_of(folders: Sequence[Path]) -> list[Row]:
    """A row for each report that has MMLU (else its validation set), then the published rows.

    Memory is that of the weights; the published figures are of the whole process.
    """
    rows: list[Row] = []
    for folder in folders:
        report: Any = read_json(folder / "report.json")
        model, figures = report["model"], {f["task"]: f for f in report["figures"]}
        figure = figures.get("mmlu") or figures.get("mmlu-val")
        if figure is None or "weights_bytes" not in model:
            raise XverseError(
                f"The report in {folder} is no point of a curve.",
                "It has no MMLU, or is of a model on a server, whose memory is not known.",
                "Evaluate the model here with --tasks mmlu at each precision.",
            )
        precision = f"int{model['quantize']}" if "quantize" in model else model["dtype"]
        memory = model["weights_bytes"] / 1e9
        facts = {"stderr": figure["stderr"], "n": figure["n"], "measured": True}
        rows.append(
            {
                "model": model["model"],
                "precision": precision,
                "memory_gb": memory,
                "mmlu": figure["value"],
                **facts,
            }
        )
    return [*rows, *({**row, "measured": False} for row in published()["quantization"])]


def as_markdown(rows: Sequence[Row]) -> str:
    """The rows for people, in the form of the model cards' table."""
    head = ("Model", "Precision", "Memory, GB", "MMLU", "± stderr")
    lines = [
        (
            row["model"] + (" (measured)" if row["measured"] else ""),
            row["precision"],
            f"{row['memory_gb']:.2f}",
            f"{row['mmlu']:.1f}",
            f"{row['stderr']:.1f}" if "stderr" in row else "",
        )
        for row in rows
    ]
    notes = ["- Measured memory is that of the weights; published memory is of the whole process."]
    return "\n".join(["# Quantization", "", *markdown_table(head, lines), *notes])
