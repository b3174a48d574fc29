"""Evaluate a model: the published benchmarks with errors, plots and hashes; compare two models."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from xverse.errors import XverseError
from xverse.verbs._options import ModelOptions

if TYPE_CHECKING:
    from xverse.evals.evaluate import Report


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """What `xverse evaluate` takes."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, GGUF file, alias or hub id; with --endpoint the model's name there."""
    tasks: str = "published"
    """Names with commas between, published (the eleven of the model cards), or a file.jsonl."""
    out: str | None = None
    """Folder of the report; a second run with the same folder goes on where the first stopped."""
    data: str | None = None
    """Folder of the benchmarks' original files ($XVERSE_EVAL_DATA; ~/.cache/xverse/evals)."""
    fetch: bool = False
    """Fetch what is missing there from Hugging Face, where that has the original files."""
    limit: int | None = None
    """Ask only so many questions of each task, drawn by --seed."""
    seed: int = 0
    """What --limit draws by."""
    shots: int | None = None
    """So many examples before each question, instead of the published number."""
    chat: bool = False
    """Ask in the model's chat format instead of as plain text."""
    endpoint: str | None = None
    """Evaluate the model behind an OpenAI-style server: http://127.0.0.1:8000/v1."""
    compare: tuple[str, str] | None = None
    """Two report folders: which model is better, item by item, and how sure that is."""
    curve: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Report folders of one model at several precisions: memory and MMLU, as a table and a plot."""
    contamination: str | None = None
    """A folder of training texts (.txt, .jsonl): which questions of --tasks stand in them."""
    no_plots: bool = False
    """Leave the pictures out; they need matplotlib."""
    list: bool = False
    """Name every task, and do nothing else."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Do what is asked: evaluate, or compare, draw a curve, look for contamination, list."""
    acts = [config.list, config.compare is not None, bool(config.curve)]
    if sum([*acts, config.contamination is not None]) > 1:
        raise XverseError(
            "Several things are asked at once.",
            "--list, --compare, --curve and --contamination are done one at a time.",
            "Give one of them.",
        )
    if config.list:
        return _list(config)
    if config.compare is not None:
        return _compare(config, Path(config.compare[0]), Path(config.compare[1]))
    if config.curve:
        return _curve(config)
    if config.contamination is not None:
        return _contamination(config, Path(config.contamination).expanduser())
    _show(config, report_of(config))
    return 0


def report_of(config: Config) -> "Report":
    """Ask the model the tasks; the report lies in a folder, too."""
    from xverse.evals.evaluate import evaluate, open_door
    from xverse.evals.tasks import tasks_of

    tasks = tasks_of(config.tasks)  # a misspelt name is told before a model is loaded
    if config.fetch:
        from xverse.evals.evaluate import data_folder
        from xverse.evals.fetch import fetch_missing

        fetch_missing(tasks, data_folder(config.data, must_exist=False))
    if config.endpoint is not None:
        from xverse.evals.endpoint import EndpointDoor

        _require_no_model_options(config)
        chat = config.chat or all(task.kind == "dialogue" for task in tasks)
        return evaluate(EndpointDoor(config.endpoint, config.model, chat=chat), **_asked(config))
    if config.model is None:
        raise XverseError(
            "No model is named.",
            "It is the first word after the verb.",
            "Give a folder, a GGUF file, an alias or a hub id; or --endpoint.",
        )
    fields = [field.name for field in dataclasses.fields(ModelOptions)]
    how = {name: getattr(config, name) for name in fields}
    return evaluate(open_door(config.model, **how), **_asked(config))


def _asked(config: Config) -> dict[str, Any]:
    """What is asked of the model, as `evaluate` takes it."""
    names = ("tasks", "data", "shots", "limit", "seed", "chat")
    return {
        **{name: getattr(config, name) for name in names},
        "out": _out(config),
        "plots": not config.no_plots,
    }


def _require_no_model_options(config: Config) -> None:
    for field in dataclasses.fields(ModelOptions):
        if getattr(config, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise XverseError(
                f"{flag} is of no use with --endpoint.",
                "The server has loaded its model already.",
                f"Leave {flag} out.",
            )


def _out(config: Config) -> Path:
    if config.out is not None:
        return Path(config.out).expanduser()
    name = (config.model or "endpoint").rstrip("/").rpartition("/")[2]
    return Path("evaluations") / name


def _show(config: Config, report: "Report") -> None:
    from xverse.evals.report import footnotes_of, rows_of

    if config.json:
        print(json.dumps({**report.to_json(), "folder": str(report.folder)}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("Task", "Result", "± stderr", "n", "Shots", box=None)
    for row in rows_of(report.to_json()):
        table.add_row(*row[:5])
    Console().print(table)
    for note in footnotes_of(report.to_json()):
        print(note)
    print(f"report: {report.folder / 'report.md'}")
    print(f"next: xverse evaluate --compare {report.folder} OTHER_FOLDER", file=sys.stderr)


def _list(config: Config) -> int:
    from xverse.evals.tasks import GROUPS, all_tasks

    tasks = all_tasks()
    if config.json:
        facts = {
            name: {"title": t.title, "kind": t.kind, "shots": t.shots, "folder": t.folder}
            for name, t in tasks.items()
        }
        print(json.dumps(facts))
        return 0
    for name, task in tasks.items():
        print(f"{name:28} {task.title} ({task.kind}, {task.shots} examples)")
    for name, members in GROUPS.items():
        print(f"{name:28} {', '.join(members)}")
    print("next: xverse evaluate MODEL --tasks mmlu,ceval --data FOLDER", file=sys.stderr)
    return 0


def _compare(config: Config, a: Path, b: Path) -> int:
    from xverse.evals.compare import as_json, as_markdown, compare, name_of

    found = compare(a, b, config.seed)
    names = name_of(a), name_of(b)
    text = as_markdown(*names, found)
    if config.out is not None:
        _write(Path(config.out).expanduser(), "compare", as_json(*names, found), text)
    print(json.dumps(as_json(*names, found)) if config.json else text)
    if not config.json:
        print("next: xverse show MODEL tells what the better one needs", file=sys.stderr)
    return 0


def _curve(config: Config) -> int:
    from xverse.evals.curve import as_markdown, rows_of
    from xverse.evals.plots import draw_quantization

    rows = rows_of([Path(folder).expanduser() for folder in config.curve])
    text = as_markdown(rows)
    if config.out is not None:
        folder = Path(config.out).expanduser()
        _write(folder, "quantization", {"rows": rows}, text)
        if not config.no_plots:
            draw_quantization(folder / "quantization.png", rows)
    print(json.dumps({"rows": rows}) if config.json else text)
    if not config.json:
        print("next: xverse show MODEL tells what memory each needs", file=sys.stderr)
    return 0


def _contamination(config: Config, corpus: Path) -> int:
    from xverse.evals.contamination import as_json, as_markdown, overlap
    from xverse.evals.evaluate import data_folder
    from xverse.evals.tasks import tasks_of

    found = overlap(tasks_of(config.tasks), data_folder(config.data), corpus)
    text = as_markdown(found)
    if config.out is not None:
        _write(Path(config.out).expanduser(), "contamination", as_json(found), text)
    print(json.dumps(as_json(found), ensure_ascii=False) if config.json else text)
    if not config.json:
        print("next: leave those documents out of the corpus, or name them with the score")
    return 0


def _write(folder: Path, name: str, facts: dict[str, object], text: str) -> None:
    from xverse.evals.report import write_text
    from xverse.files import write_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XverseError(f"{folder} cannot be made.", str(error), "Name another --out.") from error
    write_json(folder / f"{name}.json", facts)
    write_text(folder / f"{name}.md", text)
