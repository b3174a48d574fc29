"""TASKS + DOOR -> RESULTS. Asks a model every question, batch by batch, and remembers answers."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from xverse.errors import XverseError
from xverse.evals.choice import Outcome, asks_of, outcome_of
from xverse.evals.dialogue import converse
from xverse.evals.door import Door, Prompt
from xverse.evals.item import Item, Task, digest
from xverse.evals.journal import Journal
from xverse.log import progress

PROTOCOL = 1  # raised when what is asked, or how it is graded, changes: old journals end then


@dataclass(frozen=True)
class Options:
    """What is asked of how many items. `limit` items of a task are drawn by `seed`."""

    shots: int | None = None
    limit: int | None = None
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise XverseError(
                    f"{name} cannot be {value}.",
                    "It counts examples or questions.",
                    f"Give {least} or more, or leave it out.",
                )

    def chat_of(self, task: Task) -> bool:
        """Whether a task is asked in the chat format."""
        return self.chat or task.kind == "dialogue"


@dataclass(frozen=True)
class Result:
    """A task, the items that were asked, what came of each, and hashes of both."""

    task: Task
    items: Sequence[Item]
    outcomes: Sequence[Outcome]
    task_hash: str  # of the data: every item whole
    prompt_hash: str  # of what the model was shown, to the byte
    options: Options
    reads: str


@dataclass(frozen=True)
class _Batch:
    """Items that are asked together, always in the same company."""

    task: Task
    items: Sequence[Item]
    key: str


def run_tasks(
    door: Door, tasks: Sequence[Task], data: Path, out: Path, options: Options
) -> list[Result]:
    """Ask everything that `out` has no answer to yet. XverseError, before anything is asked, for
    data that is missing and for tasks that the model or the machine cannot do."""
    _require_able(door, tasks, options)
    items = {task.name: _chosen(task, data, options) for task in tasks}
    head = {
        "protocol": PROTOCOL,
        **{f"model's {key}": value for key, value in door.facts.items()},
        "chat": options.chat,
        "reads": door.reads,
        "batch": door.batch,
    }
    journal = Journal(out, head)
    batches = [b for task in tasks for b in _batches(task, items[task.name], door.batch, options)]
    missing = [batch for batch in batches if batch.key not in journal]
    ready = _tokenized(door, missing, options)
    for batch in progress(ready, total=len(missing), label="evaluating"):
        journal.add(batch.key, _ask(door, batch, options))
    results = []
    for task in tasks:
        mine = [batch for batch in batches if batch.task is task]
        outcomes = {o["name"]: o for batch in mine for o in journal[batch.key]}
        asked = items[task.name]
        results.append(
            Result(
                task,
                asked,
                [outcomes[item.name] for item in asked],
                digest([item.facts() for item in asked]),
                digest([_prompts(item, options) for item in asked], options.chat_of(task)),
                options,
                door.reads,
            )
        )
    return results


def _require_able(door: Door, tasks: Sequence[Task], options: Options) -> None:
    if any(task.sandboxed for task in tasks):
        from xverse.evals.sandbox import require_sandbox

        require_sandbox()
    for task in tasks:
        if task.kind == "text" and (options.chat or door.reads == "letters"):
            raise XverseError(
                f"{task.title} cannot be measured of this model in this way.",
                "It needs log-probabilities of plain text, and not of answers in a chat.",
                "Leave the task out, or --chat.",
            )


def _chosen(task: Task, data: Path, options: Options) -> list[Item]:
    items = task.items(data, options.shots)
    if options.limit is None or options.limit >= len(items):
        return items
    chance = random.Random(f"{options.seed}:{task.name}")
    return [items[i] for i in sorted(chance.sample(range(len(items)), options.limit))]


def _batches(task: Task, items: Sequence[Item], size: int, options: Options) -> Iterator[_Batch]:
    """Items of one group after another, which share their examples; small groups stay apart only
    where they have examples to share, or take so long that progress is to be seen and kept."""
    groups = [list(some) for _, some in groupby(items, lambda item: item.group)]
    apart = task.kind == "dialogue" or any(item.shots for item in items)
    for group in groups if apart else [list(items)]:
        for start in range(0, len(group), size):
            some = group[start : start + size]
            facts = [item.facts() for item in some]
            key = digest(PROTOCOL, task.name, facts, _settings(task, options), options.chat)
            yield _Batch(task, some, key)


def _settings(task: Task, options: Options) -> list[object]:
    shots = task.shots if options.shots is None else options.shots
    return [shots, task.kind, task.norm, task.greedy, task.max_tokens, list(task.stop), task.cut]


def _prompts(item: Item, options: Options) -> list[str]:
    shots = len(item.shots)
    first = [item.prompt(shots, stem) for stem in item.stems] or [item.prompt(shots)]
    return [*first, *item.turns]


def _ask(door: Door, batch: _Batch, options: Options) -> list[Outcome]:
    """The outcome of every item, in order; each has its name."""
    kinds: Mapping[str, Callable[[Door, _Batch, Options], list[Outcome]]] = {
        "choice": _choose,
        "writing": _write,
        "text": _foretell,
        "dialogue": _converse,
    }
    outcomes = kinds[batch.task.kind](door, batch, options)
    pairs = zip(batch.items, outcomes, strict=True)
    return [{"name": item.name, **outcome} for item, outcome in pairs]


def _choose(door: Door, batch: _Batch, options: Options) -> list[Outcome]:
    task = batch.task
    fits = [_fit(door, task, item, options) for item in batch.items]
    asks = [
        asks_of(task, item, shots, options.chat) if shots is not None else []
        for item, shots in zip(batch.items, fits, strict=True)
    ]
    readings = iter(door.read([ask for some in asks for ask in some], batch.key))
    outcomes: list[Outcome] = []
    for item, shots, some in zip(batch.items, fits, asks, strict=True):
        if shots is None:
            outcomes.append({"score": 0.0, "too_long": True})
            continue
        outcome = outcome_of(task, item, [next(readings) for _ in some])
        outcomes.append({**outcome, "shots": shots})
    return outcomes


def _write(door: Door, batch: _Batch, options: Options) -> list[Outcome]:
    task, grade = batch.task, batch.task.grade
    assert grade is not None, "who writes is graded"
    prompts: list[Prompt | None] = []
    facts: list[Outcome] = []
    for item in batch.items:
        text, fact = _fitted_text(door, task, item, options)
        prompts.append(None if text is None else Prompt(text, options.chat))
        facts.append(fact)
    asked = [prompt for prompt in prompts if prompt is not None]
    said = iter(door.write(asked, task.max_tokens, task.stop, batch.key))
    outcomes: list[Outcome] = []
    for item, prompt, fact in zip(batch.items, prompts, facts, strict=True):
        if prompt is None:
            outcomes.append({"score": 0.0, **fact})
            continue
        text = next(said)
        outcomes.append({"score": grade(item, text), "said": text, **fact})
    return outcomes


def _fitted_text(
    door: Door, task: Task, item: Item, options: Options
) -> tuple[str | None, Outcome]:
    """The prompt as it fits, None where it does not, and what was done to it."""
    shots = _fit(door, task, item, options)
    if shots is not None:
        return item.prompt(shots), {"shots": shots}
    if task.cut != "middle" or door.context is None:
        return None, {"too_long": True}
    text, room = item.prompt(0), door.context - task.max_tokens
    # Two halves may have a few more tokens together than each alone, and a chat has its marks.
    for margin in (0, 16, 64, 256):
        shorter = door.without_middle(text, room - margin) if room > margin else ""
        if shorter and door.lengths([Prompt(shorter, options.chat)])[0] <= room:
            return shorter, {"shots": 0, "cut": True}
    return None, {"too_long": True}


def _converse(door: Door, batch: _Batch, options: Options) -> list[Outcome]:
    return converse(door, batch.task, batch.items, batch.key)


def _foretell(door: Door, batch: _Batch, options: Options) -> list[Outcome]:
    texts = [item.question for item in batch.items]
    return [
        {
            "logprob": found.logprob,
            "tokens": found.tokens,
            "bytes": len(text.encode()),
            "words": len(text.split()),
        }
        for text, found in zip(texts, door.foretell(texts, batch.key), strict=True)
    ]


def _tokenized(door: Door, batches: Sequence[_Batch], options: Options) -> Iterator[_Batch]:
    """The batches, each once the door has tokenized its prompts, together and on all cores; those
    of the next one while this one is asked."""
    with ThreadPoolExecutor(1) as thread:
        done = [thread.submit(_lengths_at_once, door, batch, options) for batch in batches[:1]]
        for place, batch in enumerate(batches):
            done.pop().result()
            if place + 1 < len(batches):
                done.append(thread.submit(_lengths_at_once, door, batches[place + 1], options))
            yield batch


def _lengths_at_once(door: Door, batch: _Batch, options: Options) -> None:
    if batch.task.kind != "text":
        texts = [text for item in batch.items for text in _prompts(item, options)]
        door.lengths([Prompt(text, options.chat_of(batch.task)) for text in texts])


def _fit(door: Door, task: Task, item: Item, options: Options) -> int | None:
    """How many examples leave room for the answer, as many as there are at most; None where even
    without any the prompt is too long. hendrycks/test gives up the last ones first, too."""
    if door.context is None:
        return len(item.shots)
    longest = max((Prompt(o.lstrip()) for o in item.options), key=lambda p: len(p.text), default="")
    answer = door.lengths([longest])[0] + 1 if isinstance(longest, Prompt) else task.max_tokens
    for shots in range(len(item.shots), -1, -1):
        stems = item.stems or (item.question,)
        prompts = [Prompt(item.prompt(shots, stem), options.chat) for stem in stems]
        if max(door.lengths(prompts)) + answer <= door.context:
            return shots
    return None
