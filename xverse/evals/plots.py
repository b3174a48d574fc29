"""FIGURES -> PICTURES. Bars with errors, categories, a radar, and curves of quantization."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xverse.errors import XverseError
from xverse.evals.tables import CATEGORIES, published

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DPI = 120
OURS, THEIRS = "#2563eb", ("#9ca3af", "#d97706", "#059669", "#7c3aed")


def draw_all(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """Write every picture that the figures are enough for; their names from the report's folder.

    XverseError where matplotlib is not installed.
    """
    scored = [figure for figure in report["figures"] if figure["stderr"] is not None]
    drawn: dict[str, Canvas] = {}
    if scored:
        drawn["bars"] = bars(scored, str(report["model"]["model"]))
    if len(scored) >= 3:
        drawn["radar"] = radar(scored, str(report["model"]["model"]))
    for figure in scored:
        if figure["categories"]:
            drawn[f"categories-{figure['task']}"] = categories(figure)
    return _save(folder, drawn)


def draw_quantization(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A curve of accuracy over memory for each model of rows with model, precision, memory_gb and
    mmlu, as the published table has them."""
    canvas, axes = _axes()
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    for place, model in enumerate(models):
        some = sorted((r for r in rows if r["model"] == model), key=lambda r: -r["memory_gb"])
        color = (OURS, *THEIRS)[place % 5]
        x, y = [row["memory_gb"] for row in some], [row["mmlu"] for row in some]
        axes.plot(x, y, "o-", color=color, label=model)
        for row in some:
            at = (row["memory_gb"], row["mmlu"])
            axes.annotate(row["precision"], at, xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="memory, GB", ylabel="MMLU, %", title="What rounding costs and saves")
    axes.legend(frameon=False)
    _save(file.parent, {file.stem: canvas})


def bars(figures: Sequence[Mapping[str, Any]], name: str) -> "Canvas":
    """Every score with its standard error, and the published XVERSE figures as points."""
    canvas, axes = _axes(height=1.0 + 0.42 * len(figures))
    places = range(len(figures))
    axes.barh(
        places,
        [figure["value"] for figure in figures],
        xerr=[figure["stderr"] for figure in figures],
        color=OURS,
        height=0.6,
        label=name,
    )
    rows = _published_rows()
    for color, (model, values) in zip(THEIRS * 3, rows.items(), strict=False):
        points = [
            (values[f["task"]], place) for place, f in enumerate(figures) if f["task"] in values
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "|", color=color, ms=12, mew=2, label=model)
    axes.set_yticks(places, [figure["title"] for figure in figures])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="%")
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return canvas


def categories(figure: Mapping[str, Any]) -> "Canvas":
    """The categories of one exam beside the published ones."""
    canvas, axes = _axes()
    names = [name for name in CATEGORIES if name in figure["categories"]]
    ours = [figure["categories"][name] for name in names]
    rows: Mapping[str, Mapping[str, float]] = published()["categories"].get(figure["task"], {})
    width = 0.8 / (1 + len(rows))
    axes.bar(
        range(len(names)),
        [each["value"] for each in ours],
        width,
        yerr=[each["stderr"] for each in ours],
        color=OURS,
        label="measured",
    )
    for place, (model, values) in enumerate(rows.items(), 1):
        x = [i + place * width for i in range(len(names))]
        axes.bar(x, [values[name] for name in names], width, color=THEIRS[place - 1], label=model)
    axes.set_xticks([i + width * len(rows) / 2 for i in range(len(names))], names)
    axes.set(ylim=(0, 100), ylabel="%", title=f"{figure['title']} by category")
    axes.legend(frameon=False, fontsize="small")
    return canvas


def radar(figures: Sequence[Mapping[str, Any]], name: str) -> "Canvas":
    """All scores around a circle, beside every published model that has them all."""
    canvas, axes = _axes(width=6.5, height=5.5, projection="polar")
    angles = [2 * math.pi * place / len(figures) for place in range(len(figures))]
    tasks = [figure["task"] for figure in figures]
    lines = {name: [figure["value"] for figure in figures]}
    for model, values in _published_rows().items():
        if values.keys() >= {*tasks}:
            lines[model] = [values[task] for task in tasks]
    for color, (model, heights) in zip((OURS, *THEIRS * 3), lines.items(), strict=False):
        closed = [*heights, heights[0]]
        axes.plot([*angles, angles[0]], closed, color=color, label=model)
        axes.fill([*angles, angles[0]], closed, color=color, alpha=0.1)
    axes.set_xticks(angles, [figure["title"] for figure in figures], fontsize="small")
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.1, 1.1))
    return canvas


def _published_rows() -> dict[str, dict[str, float]]:
    """Every published model with its figures by task."""
    found: dict[str, dict[str, float]] = {}
    for table in published()["tables"]:
        for model, values in table["rows"].items():
            found.setdefault(model, {}).update(zip(table["columns"], values, strict=True))
    return found


def _axes(
    *, width: float = 7.0, height: float = 4.0, projection: str | None = None
) -> "tuple[Canvas, Axes]":
    """An empty picture; drawn without a display, whatever the machine has."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise XverseError(
            "The report's pictures cannot be drawn.",
            f"matplotlib is not installed: {error}",
            'Run: pip install "xverse-llm[eval]", or give --no-plots.',
        ) from error
    canvas = Canvas(figsize=(width, height))
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot(projection=projection)
    for side in ("top", "right"):
        if side in axes.spines:
            axes.spines[side].set_visible(False)
    return canvas, axes


def _save(folder: Path, drawn: "Mapping[str, Canvas]") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, canvas in drawn.items():
        # Without metadata, since that would have matplotlib's version in it.
        canvas.savefig(
            folder / f"{name}.png", dpi=DPI, bbox_inches="tight", metadata={"Software": None}
        )
    return [f"{folder.name}/{name}.png" for name in drawn]
