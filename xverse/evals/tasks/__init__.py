"""NAME -> TASK. Every benchmark there is; each is data, and one function that reads it."""

import importlib
from pathlib import Path

from xverse.config import nearest
from xverse.errors import XverseError
from xverse.evals.item import Task

# The published suite, in the order of the model cards.
PUBLISHED = (
    "mmlu",
    "ceval",
    "agieval",
    "gaokao-bench",
    "gaokao-english",
    "cmmlu",
    "race-m",
    "commonsenseqa",
    "piqa",
    "gsm8k",
    "humaneval",
)
_FILES = ("exams", "mixed_exams", "sentences", "reading", "writing", "long", "texts", "examples")
GROUPS = {"published": PUBLISHED}


def all_tasks() -> dict[str, Task]:
    """Every task by its name."""
    modules = [importlib.import_module(f"{__name__}.{file}") for file in _FILES]
    tasks = [task for module in modules for task in module.TASKS]
    return {task.name: task for task in tasks}


def tasks_of(names: str) -> list[Task]:
    """The tasks of names with commas between; "published" is the suite of the model cards, and a
    name that ends in .jsonl is a file of one's own questions.

    XverseError for an unknown name, naming the nearest.
    """
    known = all_tasks()
    found: dict[str, Task] = {}
    for name in [part.strip() for part in names.split(",") if part.strip()]:
        if name.endswith(".jsonl"):
            from xverse.evals.tasks.own import own_task

            task = own_task(Path(name).expanduser())
            found[task.name] = task
            continue
        for member in GROUPS.get(name, (name,)):
            if member not in known:
                raise XverseError(
                    f"There is no task {member!r}.{nearest(member, [*known, *GROUPS])}",
                    f"Known are: {', '.join([*known, *GROUPS])}, and files that end in .jsonl.",
                    "Correct --tasks.",
                )
            found[member] = known[member]
    if not found:
        raise XverseError(
            "No task is named.",
            "--tasks is a list of names with commas between.",
            "Give for example --tasks mmlu,ceval, or --tasks published.",
        )
    return list(found.values())
