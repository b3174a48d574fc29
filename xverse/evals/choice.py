"""OPTIONS -> THE LIKELIEST. Multiple choice: one reading a question, and what was picked."""

from collections.abc import Sequence

from xverse.evals.door import Ask, Prompt, Reading
from xverse.evals.item import Item, Task

Outcome = dict[str, object]


def asks_of(task: Task, item: Item, shots: int, chat: bool) -> list[Ask]:
    """What is asked: all options after one prompt, or each after its own."""
    if not item.stems:
        return [Ask(Prompt(item.prompt(shots), chat), item.options, task.greedy)]
    prompts = [Prompt(item.prompt(shots, stem), chat) for stem in item.stems]
    pairs = zip(prompts, item.options, strict=True)
    return [Ask(prompt, (option,), task.greedy) for prompt, option in pairs]


def outcome_of(task: Task, item: Item, readings: Sequence[Reading]) -> Outcome:
    """What was picked, whether that is right, and the log-probabilities it was picked by."""
    logprobs = [value for reading in readings for value in reading.logprobs]
    if task.greedy:
        return {"score": float(readings[0].greedy[0]), "logprobs": logprobs}
    picked = pick(task, item.options, logprobs)
    outcome: Outcome = {"score": float(picked == item.gold), "picked": picked}
    said = readings[0].said
    return outcome | ({"logprobs": logprobs} if said is None else {"said": said})


def pick(task: Task, options: Sequence[str], logprobs: Sequence[float]) -> int | None:
    """The first of the likeliest options, as numpy's argmax has it; None where none was named."""
    if max(logprobs) == float("-inf"):
        return None
    if task.norm == "characters":
        pairs = zip(logprobs, options, strict=True)
        logprobs = [logprob / max(len(option.lstrip()), 1) for logprob, option in pairs]
    return max(range(len(logprobs)), key=logprobs.__getitem__)
