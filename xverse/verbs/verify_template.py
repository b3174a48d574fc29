"""Prove that training, server, transformers and GGUF read a model's conversations alike."""

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from xverse.interop.same_ids import Finding, Proof

SIGNS = {
    "equal": "[green]equal",
    "same text": "[yellow]same text",
    "differs": "[bold red]differs",
    "refuses": "[dim]refuses",
    "not checked": "[dim]not checked",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `xverse verify-template` takes."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder, GGUF file, alias or hub id; its weights are not read."""
    strict: bool = False
    """Fail too where a program has the same text and cuts it into other ids."""
    json: bool = False
    """Print one JSON object."""


def run(config: Config) -> int:
    """Print a table, and what differs; the exit code is 1 where something does."""
    from xverse.checkpoint.resolve import resolve
    from xverse.interop.same_ids import compare

    proof = compare(resolve(config.model))
    holds = proof.holds(strict=config.strict)
    if config.json:
        print(json.dumps(proof.facts() | {"holds": holds}, ensure_ascii=False))
    else:
        _print(proof)
        following = f"xverse serve {config.model}" if holds else "xverse verify-template --help"
        print(f"next: {following}", file=sys.stderr)
    return 0 if holds else 1


def _print(proof: "Proof") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from xverse.interop.same_ids import TRAINING, UNCHECKED, Finding

    console = Console()
    routes = [r for r in dict.fromkeys(f.route for f in proof.findings) if r != TRAINING]
    table = Table(title=f"chat format {escape(proof.chat_format)}: next to the ids of training")
    for name in ("conversation", *routes):
        table.add_column(name)
    for name in dict.fromkeys(finding.conversation for finding in proof.findings):
        found = {f.route: f.verdict for f in proof.findings if f.conversation == name}
        verdicts = [found.get(route, found.get(TRAINING, "")) for route in routes]
        table.add_row(name, *(SIGNS[verdict] for verdict in verdicts))
    console.print(table)
    told: dict[str, list[Finding]] = {}
    for finding in proof.findings:
        if finding.verdict not in ("equal", "not checked"):
            told.setdefault(_told(finding), []).append(finding)
    for line, same in told.items():
        where = " and ".join(dict.fromkeys(finding.conversation for finding in same))
        who = " and ".join(dict.fromkeys(finding.route for finding in same))
        console.print(f"{where}, {who}: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(UNCHECKED, highlight=False)


def _told(finding: "Finding") -> str:
    if finding.position is None:
        return f"{finding.verdict}: {finding.detail}"
    ids = f"{list(finding.trained)} was learned, {list(finding.found)} is read"
    where = f"{finding.verdict} from token {finding.position} on"
    return f"{where}: {ids} ({finding.detail})"
