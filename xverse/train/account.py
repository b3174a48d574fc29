"""JOURNAL -> SECONDS. Where the time of a run went: to steps that count, or lost, and to what."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def account(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by cause, from the lines of metrics.jsonl; they add up to "total".

    "productive" are the steps whose result the run has now. "repeated" are those that were lost
    with a process or rolled back, "skipped" the bad ones, "compiling" what the first step of a
    process took longer than usual, "down" the time between processes. "effective" is the share of
    the productive: the effective training time.
    """
    spent: dict[str, float] = defaultdict(float)
    steps: dict[int, float] = {}
    openers: set[int] = set()  # steps that were the first of a process
    began = last = None
    opening = False
    for event in events:
        began = event["time"] if began is None else began
        match event["event"]:
            case "start":
                spent["down"] += 0.0 if last is None else event["time"] - last
            case "ready":
                spent["starting"] += event["seconds"]
                spent["repeated"] += _withdraw(steps, event["step"])
                opening = True
            case "step":
                spent["waiting for data"] += event.get("waited", 0.0)
                steps[event["step"]] = event["seconds"]
                openers.discard(event["step"])
                if opening:
                    openers.add(event["step"])
                opening = False
            case "bad":
                spent["skipped"] += event["seconds"]
            case "rollback":
                spent["rolling back"] += event["seconds"]
                spent["repeated"] += _withdraw(steps, event["step"])
            case "save":
                spent["saving"] += event["seconds"]
            case "evaluate":
                spent["evaluating"] += event["seconds"]
        last = event["time"]
    ordinary = [seconds for step, seconds in steps.items() if step not in openers]
    usual = statistics.median(ordinary or [0.0])
    for step in openers & steps.keys():
        longer = max(0.0, steps[step] - usual)
        steps[step] -= longer
        spent["compiling"] += longer
    spent["productive"] = sum(steps.values())
    total = 0.0 if began is None or last is None else last - began
    spent["other"] = total - sum(spent.values())
    return {**spent, "total": total, "effective": spent["productive"] / total if total else 0.0}


def _withdraw(steps: dict[int, float], first: int) -> float:
    """Take out the steps from `first` on, and give their seconds."""
    return sum([steps.pop(step) for step in list(steps) if step >= first])
