"""MESHES -> THE SAME RUN? One run over meshes of two and four processes, and with workers killed.

Every mesh trains what one process trains, from the same weights; the largest differences of losses,
norms and final weights go to bench/results/train_axes.json. Then torchrun starts a run again each
time that one of its workers is killed. On a CPU, over gloo; half an hour on two cores.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.record import record
from tests.parallel.fsdp_ranks import RUNS, train
from tests.train.tiny import ALONE
from xverse.device import child_environment
from xverse.train.journal import last_steps, read_events

MESHES = {
    2: (
        "dense",
        "dense:tensor=2",
        "dense:context=2",
        "dense:pipeline=2",
        "tied:tensor=2",
        "deep:pipeline=2,interleave=2",
        "mixture",
        "mixture:expert=2",
        "mixture:tensor=2",
        "mixture:context=2",
        "mixture:pipeline=2",
    ),
    4: (
        "dense:tensor=2,shard=2",
        "dense:tensor=2,context=2",
        "dense:data=2,tensor=2",
        "deep:pipeline=2,interleave=2,shard=2",
        "deep:pipeline=2,tensor=2",
        "mixture:expert=2,shard=2",
        "mixture:expert=2,tensor=2",
        "mixture:pipeline=2,expert=2",
        "mixture:pipeline=2,context=2",
    ),
}
ELASTIC = "dense:tensor=2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    asked = parser.parse_args()
    random.seed(20261121)
    torch.set_num_threads(1)
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for run in ("dense", "tied", "deep", "mixture"):
            train(home / "1", run, ALONE)
        for processes, names in MESHES.items():
            torchrun(home / str(processes), processes, *names).wait()
            for name in names:
                run = name.partition(":")[0]
                found = differences(home / "1" / run, home / str(processes) / name)
                figures[f"{processes} processes, {name}"] = found
                print(json.dumps({name: found}), flush=True)
        figures["elastic"] = elastic(home, asked.kills)
        print(json.dumps(figures["elastic"]))
    print(record("train_axes", figures, packages=("safetensors",)))


def torchrun(
    folder: Path, processes: int, *names: str, restarts: int = 0
) -> "subprocess.Popen[bytes]":
    words = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--standalone"]
    work = ["-m", "tests.parallel.fsdp_ranks", str(folder), *names]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words, *work],
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


def differences(*runs: Path) -> dict[str, float]:
    """Of two runs, the largest of all losses and norms, and of all weights at the end."""
    steps = [last_steps(read_events(folder / "metrics.jsonl")) for folder in runs]
    assert len(steps[0]) == len(steps[1]) == 20
    weights = [torch.load(folder / "weights.pt") for folder in runs]
    assert list(weights[0]) == list(weights[1])
    found = {
        fact: max(abs(one[fact] - other[fact]) for one, other in zip(*steps, strict=True))
        for fact in ("loss", "norm")
    }
    apart = [(weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]]
    return found | {"weights": max(apart)}


def elastic(home: Path, kills: int) -> dict[str, object]:
    """Kill a worker whenever some more steps were made; torchrun starts all again."""
    metrics = home / "elastic" / ELASTIC / "metrics.jsonl"
    parent = torchrun(home / "elastic", 2, ELASTIC, restarts=kills)
    steps = RUNS[ELASTIC.partition(":")[0]][1].steps
    after = sorted(random.sample(range(1, steps - 1), kills))
    for step in after:
        while made(metrics) <= step and parent.poll() is None:
            time.sleep(0.01)
        os.kill(random.choice(children(parent.pid)), signal.SIGKILL)
        began = made_starts(metrics)
        while made_starts(metrics) == began and parent.poll() is None:
            time.sleep(0.05)
    code = parent.wait()
    difference = differences(home / "2" / ELASTIC, home / "elastic" / ELASTIC)
    return {"kills_after_steps": after, "exit_code": code, "from_undisturbed": difference} | {
        "resumed_at": [e["step"] for e in read_events(metrics) if e["event"] == "resume"]
    }


def made(metrics: Path) -> int:
    """Steps that the run has made by now."""
    return len(last_steps(read_events(metrics))) if metrics.exists() else 0


def made_starts(metrics: Path) -> int:
    """How often it was ready to train."""
    return sum(event["event"] == "ready" for event in read_events(metrics))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    main()
