"""OUTCOMES -> FIGURES. Scores with their standard errors, by group and by category."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from xverse.evals.choice import Outcome
from xverse.evals.harness import Result


@dataclass(frozen=True)
class Mean:
    """A mean in percent, its standard error, and of how many items it is."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Figure:
    """What a task came to, and everything needed to ask the same again.

    `value` is in percent, or where `metric` says so a perplexity (its standard error is of the mean
    over documents of bits a byte, and None). `fewer_shots`, `cut` and `too_long` count items that
    were not asked as all others: with fewer examples, without their middle, or not at all.
    """

    task: str
    title: str
    metric: str
    value: float
    stderr: float | None
    n: int
    shots: int
    seed: int
    chat: bool
    reads: str
    task_hash: str
    prompt_hash: str
    groups: Mapping[str, Mean]
    categories: Mapping[str, Mean]
    fewer_shots: int = 0
    cut: int = 0
    too_long: int = 0
    details: Mapping[str, float] | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The figure as JSON."""
        return asdict(self)


def figure_of(result: Result) -> Figure:
    """All figures of one task."""
    task, options, outcomes = result.task, result.options, result.outcomes
    shots = max((len(item.shots) for item in result.items), default=0)
    counts = {
        "fewer_shots": sum(cast(int, o.get("shots", shots)) < shots for o in outcomes),
        "cut": sum(bool(o.get("cut")) for o in outcomes),
        "too_long": sum(bool(o.get("too_long")) for o in outcomes),
    }
    facts: dict[str, Any] = {
        "task": task.name,
        "title": task.title,
        "n": len(outcomes),
        "shots": shots,
        "seed": options.seed,
        "chat": options.chat_of(task),
        "reads": result.reads if task.kind == "choice" else "text",
        "task_hash": result.task_hash,
        "prompt_hash": result.prompt_hash,
        "note": task.note,
        **counts,
    }
    if task.kind == "text":
        return Figure(**facts, **_perplexity(outcomes))
    groups = _means(zip((item.group for item in result.items), outcomes, strict=True))
    whole = mean([_score(outcome) for outcome in outcomes])
    total = mean_of_means(list(groups.values())) if task.by_group else whole
    return Figure(
        **facts,
        metric="accuracy" if task.kind == "choice" else "score",
        value=total.value,
        stderr=total.stderr,
        groups=groups if len(groups) > 1 else {},
        categories=_by_category(result, groups),
    )


def mean(scores: Sequence[float]) -> Mean:
    """In percent; the standard error is that of a sample, 0 for a single item."""
    n = len(scores)
    middle = math.fsum(scores) / n
    spread = math.fsum((score - middle) ** 2 for score in scores)
    stderr = math.sqrt(spread / (n - 1) / n) if n > 1 else 0.0
    return Mean(100 * middle, 100 * stderr, n)


def mean_of_means(means: Sequence[Mean]) -> Mean:
    """Every group counts alike; the groups' errors are independent of each other."""
    count = len(means)
    stderr = math.sqrt(math.fsum(each.stderr**2 for each in means)) / count
    return Mean(math.fsum(m.value for m in means) / count, stderr, sum(m.n for m in means))


def _means(pairs: Iterable[tuple[str, Outcome]]) -> dict[str, Mean]:
    scores: dict[str, list[float]] = {}
    for key, outcome in pairs:
        scores.setdefault(key, []).append(_score(outcome))
    return {key: mean(some) for key, some in scores.items()}


def _by_category(result: Result, groups: Mapping[str, Mean]) -> dict[str, Mean]:
    categories = result.task.categories
    if not categories:
        return {}
    if not result.task.by_group:
        names = (categories[item.group] for item in result.items)
        return _means(zip(names, result.outcomes, strict=True))
    members: dict[str, list[Mean]] = {}
    for group, each in groups.items():
        members.setdefault(categories[group], []).append(each)
    return {category: mean_of_means(some) for category, some in members.items()}


def _perplexity(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of all words, bytes and tokens together; a word is what stands between spaces."""
    total = {
        key: math.fsum(cast(float, outcome[key]) for outcome in outcomes)
        for key in ("logprob", "words", "bytes", "tokens")
    }
    per = {kind: -total["logprob"] / max(total[kind], 1) for kind in ("words", "bytes", "tokens")}
    details = {
        "perplexity_of_words": _exp(per["words"]),
        "perplexity_of_bytes": _exp(per["bytes"]),
        "perplexity_of_tokens": _exp(per["tokens"]),
        "bits_per_byte": per["bytes"] / math.log(2),
    }
    empty: dict[str, Mean] = {}
    return {
        "metric": "perplexity of tokens",
        "value": details["perplexity_of_tokens"],
        "stderr": None,
        "details": details,
        "groups": empty,
        "categories": empty,
    }


def _exp(value: float) -> float:
    """e to it; the largest number there is where that is more."""
    return math.exp(min(value, 700.0))


def _score(outcome: Outcome) -> float:
    return cast(float, outcome["score"])
