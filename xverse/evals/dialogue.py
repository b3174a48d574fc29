"""TURNS -> ANSWERS -> JUDGEMENT. A conversation is held to its end, and judged as a whole."""

from collections.abc import Sequence

from xverse.evals.choice import Outcome
from xverse.evals.door import Door, Prompt
from xverse.evals.item import Item, Task


def converse(door: Door, task: Task, items: Sequence[Item], namespace: str) -> list[Outcome]:
    """Hold all conversations side by side, each turn after the model's own answers before it.

    An item whose next turn would leave no room for an answer ends there and counts as wrong.
    """
    said: list[list[str]] = [[] for _ in items]
    for turn in range(1 + max(len(item.turns) for item in items)):
        asked = {
            place: _prompt(item, said[place])
            for place, item in enumerate(items)
            if turn <= len(item.turns) and turn == len(said[place])
        }
        fitting = _fitting(door, task, asked)
        if not fitting:
            break
        answers = door.write([*fitting.values()], task.max_tokens, task.stop, namespace)
        for place, answer in zip(fitting, answers, strict=True):
            said[place].append(answer)
    return [_outcome(task, item, answers) for item, answers in zip(items, said, strict=True)]


def _prompt(item: Item, said: Sequence[str]) -> Prompt:
    """The next message, after all messages and answers before it."""
    messages = (item.prompt(0), *item.turns)
    before = [text for pair in zip(messages, said, strict=False) for text in pair]
    return Prompt(messages[len(said)], True, tuple(before))


def _fitting(door: Door, task: Task, asked: dict[int, Prompt]) -> dict[int, Prompt]:
    if door.context is None:
        return asked
    room = door.context - task.max_tokens
    lengths = door.lengths([*asked.values()])
    pairs = zip(asked.items(), lengths, strict=True)
    return {place: prompt for (place, prompt), length in pairs if length <= room}


def _outcome(task: Task, item: Item, answers: Sequence[str]) -> Outcome:
    said = [answer.strip() for answer in answers]
    if len(said) <= len(item.turns):
        reason = f"turn {len(said) + 1} leaves no room in the context for an answer"
        return {"score": 0.0, "said": said, "reason": reason, "too_long": True}
    assert task.judge is not None, "who converses is judged"
    found = task.judge(item, said)
    return {"score": float(found.passed), "said": said, "reason": found.reason}
