"""A RUN'S FOLDER -> FIGURES AND A PICTURE. What metrics.jsonl of a real run says, on record."""

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.real_pack import FACTS
from bench.real_train import MODEL, STATE
from xverse.engine.llm import LLM
from xverse.engine.request import Sampling
from xverse.files import read_json
from xverse.train.account import account
from xverse.train.journal import METRICS, last_steps, read_events

POINTS = 300  # of the loss curve
FORMULA = (
    "strict: 6 x parameters without the input embedding + 6 x layers x width x sequence (attention "
    "counted causal), over 989e12; PaLM's: all parameters, and 12 x"
)
PROMPTS = {
    "en": "The file system is",
    "de": "Das Programm öffnet eine Datei und",
    "zh": "在这个菜单中，您可以",
    "ja": "このコマンドは",
    "fr": "Pour ouvrir une fenêtre,",
    "python": "def read_lines(path):\n",
}


def report(folder: Path, device: str) -> dict[str, Any]:
    """Figures of the run in `folder`, as far as it has come."""
    events = list(read_events(folder / MODEL / "run" / METRICS))
    steps = last_steps(iter(events))
    state: Any = read_json(folder / STATE)
    found: dict[str, Any] = {
        "formula": FORMULA,
        "data": read_json(folder / "data" / FACTS),
        "config": (folder / "run.toml").read_text("utf-8"),
        "steps": steps[-1]["step"] + 1,
        "planned_steps": state["steps"],
        "tokens": steps[-1]["tokens"],
        **speed(steps),
        **stops(events, state),
        "loss": curve(steps),
        "validation": validation(events),
    }
    if (folder / MODEL / "manifest.json").exists():
        found |= folder_facts(folder / MODEL, device)
    return found


def speed(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the step that is neither fast nor slow."""
    found = {"tokens_per_s": round(statistics.median(s["tokens_per_second"] for s in steps), 1)}
    for name in ("mfu", "mfu_palm"):
        if shares := [step[name] for step in steps if step.get(name) is not None]:
            found[f"{name}_median"] = round(statistics.median(shares), 4)
    return found


def stops(events: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
    """How often it was interrupted, and where its seconds went.

    Between two calls nothing runs because nobody has called: these seconds are left out of
    `effective_while_called`, and nothing else is.
    """
    spent = account(events)
    calls = state["calls"]
    paused = sum(later["began"] - one["ended"] for one, later in pairwise(calls))
    resumes = [e for e in events if e["event"] == "resume"]
    return {
        "calls": len(calls),
        "seconds_of_calls": round(sum(c.get("ended", c["began"]) - c["began"] for c in calls), 1),
        "killed": state["ended"].count("killed"),
        "stopped": state["ended"].count("stopped"),
        "resumed_after_steps": [event["step"] for event in resumes],
        "bad_steps": sum(event["event"] == "bad" for event in events),
        "rollbacks": sum(event["event"] == "rollback" for event in events),
        "seconds": {cause: round(seconds, 2) for cause, seconds in spent.items()},
        "paused_between_calls_s": round(paused, 1),
        "effective_while_called": round(spent["productive"] / (spent["total"] - paused), 4),
    }


def curve(steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean loss of POINTS parts of the run, with the step and tokens at the end of each."""
    size = max(1, -(-len(steps) // POINTS))
    parts = [steps[first : first + size] for first in range(0, len(steps), size)]
    return [
        {
            "step": part[-1]["step"] + 1,
            "tokens": part[-1]["tokens"],
            "loss": round(statistics.mean(step["loss"] for step in part), 4),
            "rate": part[-1]["rate"],
        }
        for part in parts
    ]


def validation(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss and bits a byte by language, of each evaluation that the run has now."""
    found = {event["step"]: event for event in events if event["event"] == "evaluate"}
    return [
        {
            "step": step,
            "loss": round(event["loss"], 4),
            "bits_per_byte": {
                name.removeprefix("bits_per_byte."): round(value, 4)
                for name, value in event.items()
                if name.startswith("bits_per_byte.")
            },
        }
        for step, event in sorted(found.items())
    ]


def folder_facts(model: Path, device: str) -> dict[str, Any]:
    """What the model folder weighs, and what it says."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    llm = LLM(model, device=device)
    sampling = Sampling(max_tokens=64, temperature=0.7, top_p=0.9, seed=0)
    answers = llm.generate(list(PROMPTS.values()), sampling)
    samples = {
        name: prompt + answer.text
        for (name, prompt), answer in zip(PROMPTS.items(), answers, strict=True)
    }
    llm.close()
    return {"folder_MB": round(size / 1e6, 1), "samples": samples}


def plot(figures: dict[str, Any], target: Path) -> None:
    """Loss of training and validation, and bits a byte by language, over the tokens."""
    from matplotlib.figure import Figure

    points = figures["loss"]
    tokens_at = {point["step"]: point["tokens"] / 1e6 for point in points}
    per_step = figures["tokens"] / figures["steps"] / 1e6
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(list(tokens_at.values()), [point["loss"] for point in points], label="training")
    seen = [evaluation["step"] * per_step for evaluation in figures["validation"]]
    left.plot(seen, [e["loss"] for e in figures["validation"]], "o-", ms=3, label="held out")
    for step in figures["resumed_after_steps"]:
        left.axvline(step * per_step, color="gray", lw=0.8, ls=":")
    left.set_ylabel("loss, nats a token (dotted: gone on after an end)")
    left.set_ylim(top=min(points[0]["loss"], points[-1]["loss"] + 4))
    left.legend()
    last = figures["validation"][-1]["bits_per_byte"] if seen else {}
    for language in sorted(last, key=last.__getitem__):
        bits = [e["bits_per_byte"].get(language) for e in figures["validation"]]
        right.plot(seen, bits, lw=1.2, label=f"{language} {last[language]:.2f}")
    right.set_ylabel("held out, bits a byte")
    right.legend(fontsize=7, ncols=2)
    for axis in (left, right):
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
