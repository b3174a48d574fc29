"""DIALOGUES -> MARKDOWN. Every conversation of a report, its verdict, and the reason for it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from xverse.evals.choice import Outcome
from xverse.evals.harness import Result
from xverse.evals.item import Item
from xverse.evals.report import markdown_table, write_text

TRANSCRIPTS = "transcripts.md"


def write_transcripts(folder: Path, model: str, results: Sequence[Result]) -> None:
    """Write the file into `folder`, where any of the tasks is a dialogue."""
    dialogues = [result for result in results if result.task.kind == "dialogue"]
    if dialogues:
        write_text(folder / TRANSCRIPTS, as_markdown(model, dialogues))


def as_markdown(model: str, results: Sequence[Result]) -> str:
    """What passed in each group, then every conversation whole."""
    lines = [f"# {_plain(model)}", ""]
    for result in results:
        pairs = list(zip(result.items, result.outcomes, strict=True))
        groups: dict[str, list[bool]] = {}
        for item, outcome in pairs:
            groups.setdefault(item.group, []).append(outcome["score"] == 1.0)
        lines += [f"## {result.task.title}", ""]
        rows = [(group, str(sum(some)), str(len(some))) for group, some in groups.items()]
        lines += markdown_table(("Kind", "Passed", "of"), rows)
        for item, outcome in pairs:
            lines += _conversation(item, outcome)
    return "\n".join(lines).rstrip() + "\n"


def _conversation(item: Item, outcome: Outcome) -> list[str]:
    verdict = "passed" if outcome["score"] == 1.0 else "failed"
    lines = [f"### {item.name}: {verdict}", "", _plain(str(outcome["reason"])), ""]
    messages = (item.prompt(0), *item.turns)
    # The last message has no answer where it did not fit.
    for message, answer in zip(messages, [*cast(list[str], outcome["said"]), None], strict=False):
        lines += ["User:", "", *_fenced(message)]
        if answer is None:
            break
        lines += ["Model:", "", *_fenced(answer)]
    return lines


def _fenced(text: str) -> list[str]:
    """The text as it is, in a fence that it cannot close."""
    fence = "~" * max(3, 1 + max(map(len, re.findall("~+", text)), default=0))
    return [f"{fence}text", text, fence, ""]


def _plain(text: str) -> str:
    """Text that a model or a server gave, in one line without markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~])", r"\\\1", " ".join(text.split()))
