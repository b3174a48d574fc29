"""THE PUBLISHED FINE-TUNING COMMAND, AS LONG AS IT WAS MEANT. Its intervals, on real instructions.

    python -m bench.published_command alpaca_data.json

The guides' arguments and deepspeed.json as they stand, but for the paths: a tiny model of
XVERSE's form, and as many rows of the file as make more than 400 steps. In bf16 on one process and
on two (gloo); then in fp32 on one and, with half the passes each, on two: the same losses.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.record import ROOT, record
from tests.tiny_model import write_published_folder
from tests.verbs.test_train_bash import DEEPSPEED, metrics, words
from xverse.checkpoint.load import load
from xverse.device import child_environment
from xverse.train.journal import last_steps

PICTURES = ("training_loss.png", "training_eval_loss.png")


def main() -> None:
    """Run, look at what it left, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a JSON file in Alpaca's form")
    parser.add_argument("--rows", type=int, default=3400)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place, json.loads(asked.data.read_text("utf-8"))[: asked.rows])
        fp32: dict[str, str | None] = {"bf16": None}
        halved = fp32 | {"gradient_accumulation_steps": "2"}
        for name, processes, changes in (
            ("bf16, one process", 1, {}),
            ("bf16, two processes", 2, {}),
            ("fp32, one process", 1, fp32),
            ("fp32, two processes, half the passes", 2, halved),
        ):
            out = place / f"out{len(figures)}"
            auto = {"bf16": {"enabled": "auto"}} if "bf16" in changes else {}
            (place / "deepspeed.json").write_text(json.dumps(DEEPSPEED | auto))
            run(place, processes, words(place, out.name, **changes))
            figures[name] = left(out)
            print(name, json.dumps(figures[name], indent=1), flush=True)
        most = apart(place / "out2", place / "out3")
        figures["fp32: largest difference of losses, relative"] = most
    record("published_command", {"data": asked.data.name, "rows": asked.rows, **figures}, ())
    print(json.dumps(figures, indent=1))


def prepare(place: Path, rows: list[dict[str, str]]) -> None:
    """The model, and the data under the name that the guides give it."""
    write_published_folder(place / "model", shards=1)
    file = place / "model" / "config.json"
    long = {"max_position_embeddings": 1024}  # samples are cut there, as LLaMA-Factory's default is
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | long), "utf-8")
    (place / "data").mkdir()
    (place / "data" / "gpt4.json").write_text(json.dumps(rows))
    info = {"alpaca_gpt4_en": {"file_name": "gpt4.json"}}
    (place / "data" / "dataset_info.json").write_text(json.dumps(info))


def run(place: Path, processes: int, arguments: list[str]) -> None:
    """examples/train_bash.py, by itself or under torchrun; its last words if it fails."""
    python = [sys.executable]
    if processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ended = subprocess.run(
        [*python, str(ROOT / "examples" / "train_bash.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=child_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def left(out: Path) -> dict[str, Any]:
    """What a run wrote: when it logged, evaluated and saved, and which model it kept."""
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    state = json.loads((out / "trainer_state.json").read_text())
    events = metrics(out)
    held = {line["current_steps"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert state["best_metric"] == min(held.values())
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    logged = [line["current_steps"] for line in lines if "loss" in line]
    total = state["max_steps"]
    assert logged == sorted({*range(10, total + 1, 10), total})
    load(out)  # the model is whole
    losses = [step["loss"] for step in last_steps(iter(events))]
    assert len(losses) == total
    return {
        "steps": total,
        "logged every": 10,
        "evaluated at": held,
        "saved at": sorted({event["step"] for event in events if event["event"] == "save"}),
        "best": state["best_metric"],
        "loss of the first and the last 10 steps": [sum(losses[:10]) / 10, sum(losses[-10:]) / 10],
    }


def apart(one: Path, two: Path) -> float:
    """The largest relative difference between the losses of two runs, step by step."""
    pairs = zip(*(last_steps(iter(metrics(out))) for out in (one, two)), strict=True)
    return max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs)


if __name__ == "__main__":
    main()
