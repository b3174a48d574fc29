"""MODEL -> REPORT. One call: the tasks are asked, the figures computed, the report written."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xverse.errors import XverseError
from xverse.evals.door import Door
from xverse.evals.figures import Figure, figure_of
from xverse.evals.harness import Options, Result, run_tasks
from xverse.evals.report import write_report
from xverse.evals.tasks import tasks_of
from xverse.evals.transcripts import write_transcripts

ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Report:
    """The figures of one model, and the folder that holds the report on them."""

    model: dict[str, object]
    figures: tuple[Figure, ...]
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, without the folder it lies in."""
        return {"model": self.model, "figures": [figure.to_json() for figure in self.figures]}


def evaluate(
    model: "str | Path | Door",
    tasks: str,
    *,
    out: str | Path,
    data: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    plots: bool = True,
    **how: Any,
) -> Report:
    """Ask `model` (as `LLM` takes it, `how` being LLM's own options; or a Door) the `tasks`.

    `tasks` are names with commas between, "published" for the suite of the model cards. `data` is
    the folder of the benchmarks' original files. What `out` holds of the same run already is not
    asked again, and the report comes out the same to the last byte. `limit` asks so many questions
    of each task, drawn by `seed`. XverseError for anything that cannot be asked.
    """
    chosen = tasks_of(tasks)
    options = Options(shots=shots, limit=limit, seed=seed, chat=chat)
    folder, files = Path(out).expanduser(), data_folder(data)
    door = open_door(model, **how) if isinstance(model, (str, Path)) else model
    results = run_tasks(door, chosen, files, folder, options)
    report = Report(dict(door.facts), tuple(map(figure_of, results)), folder)
    _write_items(folder / ITEMS, results)
    write_transcripts(folder, str(door.facts["model"]), results)
    write_report(folder, report.to_json(), plots=plots)
    return report


def open_door(model: str | Path, **how: Any) -> Door:
    """A model in this process, beginnings shared; it is loaded here."""
    from xverse.engine.llm import LLM
    from xverse.evals.local import LocalDoor

    llm = LLM(model, share_prefixes=True, **how)
    named = ("quantize", "kv_dtype", "deterministic")
    stated = {key: how[key] for key in named if how.get(key) not in (None, False, "auto")}
    return LocalDoor(llm, **stated)


def data_folder(data: str | Path | None, *, must_exist: bool = True) -> Path:
    """The folder of the benchmarks: as named, else $XVERSE_EVAL_DATA, else in the cache."""
    from xverse.device import env

    named = str(data) if data is not None else env("XVERSE_EVAL_DATA", "")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "xverse" / "evals"
    if must_exist and data is not None and not folder.is_dir():
        raise XverseError(
            f"There is no folder {str(folder)!r}.",
            "--data names the folder of the benchmarks' original files.",
            "Correct it; docs/evaluate.md tells the layout.",
        )
    return folder


def _write_items(file: Path, results: Sequence[Result]) -> None:
    """What came of every item, for comparing two models item by item."""
    aside = file.with_name(f"{file.name}.partial")
    with aside.open("w", encoding="utf-8", errors="surrogatepass") as lines:
        for result in results:
            for outcome in result.outcomes:
                line = {"task": result.task.name, "hash": result.prompt_hash, **outcome}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    aside.replace(file)
