"""Try the ten kinds of examples of the model cards on a chat model, and judge every answer."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from xverse.verbs._options import ModelOptions

if TYPE_CHECKING:
    from xverse.evals.evaluate import Report


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """What `xverse demo-eval` takes: `xverse evaluate --tasks examples`, with each verdict."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, GGUF file, alias or hub id; with --endpoint the model's name there."""
    endpoint: str | None = None
    """Ask the model behind an OpenAI-style server: http://127.0.0.1:8000/v1."""
    out: str | None = None
    """Folder of the report; a second run with the same folder goes on where the first stopped."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Print every verdict with its reason; the exit code is 1 where an example fails."""
    from xverse.evals.evaluate import ITEMS
    from xverse.evals.tasks.sentences import lines_of
    from xverse.verbs import evaluate

    named = config.model or "endpoint"
    out = config.out or str(Path("evaluations") / f"{Path(named).name}-examples")
    facts = {**dataclasses.asdict(config), "out": out}
    report = evaluate.report_of(evaluate.Config(**facts, tasks="examples", no_plots=True))
    outcomes = lines_of(report.folder / ITEMS)
    if config.json:
        told = {**report.to_json(), "examples": outcomes, "folder": str(report.folder)}
        print(json.dumps(told, ensure_ascii=False))
    else:
        _print(report, outcomes)
    return 0 if all(outcome["score"] == 1.0 for outcome in outcomes) else 1


def _print(report: "Report", outcomes: list[dict[str, Any]]) -> None:
    from xverse.evals.report import footnotes_of
    from xverse.evals.transcripts import TRANSCRIPTS

    for outcome in outcomes:
        verdict = "passed" if outcome["score"] == 1.0 else "failed"
        print(f"{verdict}  {outcome['name']:18} {outcome['reason']}")
    for kind, mean in report.figures[0].groups.items():
        print(f"{kind:22} {round(mean.value * mean.n / 100)} of {mean.n}")
    for note in footnotes_of(report.to_json()):
        print(note)
    print(f"conversations: {report.folder / TRANSCRIPTS}")
    print(f"next: xverse evaluate --compare {report.folder} OTHER_FOLDER", file=sys.stderr)
