"""One run over two processes and gloo, along every axis: the losses and weights of one process, and
checkpoints that any mesh goes on from."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parallel.fsdp_ranks import RUNS, rewind, train
from tests.train.tiny import ALONE
from xverse.device import child_environment
from xverse.train.journal import last_steps, read_events

pytestmark = pytest.mark.timeout(900)

# Runs of two processes, as fsdp_ranks takes them. What goes on has been trained on another mesh.
TOGETHER = (
    *(name for name in RUNS if name not in ("dense", "tied")),
    "dense<alone",
    "dense:tensor=2",
    "dense:context=2",
    "tied:tensor=2",
    "deep:pipeline=2,interleave=2",
    "mixture:expert=2",
    "mixture:tensor=2<mixture:expert=2",
    "mixture:pipeline=2<mixture:tensor=2",
    "mixture:context=2<mixture:pipeline=2",
    "dense:offload=optimizer",
    "dense:offload=parameters<dense:offload=optimizer",
    "copies:data=2,offload=parameters",
    "mixture:tensor=2,offload=optimizer",
    "lora:offload=optimizer",
    "lora:offload=parameters",
)
NAMES = [one.partition("<")[0] for one in TOGETHER]
RESUMED = [one.partition("<")[0] for one in TOGETHER if "<" in one]
# Muon makes small directions as large as others, and the last bits of a sum with them.
TOLERANCES = {"bf16": 0.01, "muon": 5e-3}


def torchrun(folder: Path, *names: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "tests.parallel.fsdp_ranks", str(folder), *names]
    result = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        timeout=850,  # 40 s on a machine with nothing else to do
    )
    assert result.returncode == 0, result.stderr[-4000:]


def told(folder: Path, kind: str, fact: str) -> list[float]:
    """A number of every event of a kind, by step; of what was done again, the latest."""
    events = read_events(folder / "metrics.jsonl")
    if kind == "step":
        return [facts[fact] for facts in last_steps(events)]
    found = {facts["step"]: facts[fact] for facts in events if facts["event"] == kind}
    return [found[step] for step in sorted(found)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        train(folder, name, ALONE)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    folder = tmp_path_factory.mktemp("together")
    rewind(alone / "dense", folder / "alone", 10)
    torchrun(folder, *TOGETHER)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_one_process(alone: Path, together: Path, name: str) -> None:
    run = name.partition(":")[0]
    tolerance = TOLERANCES.get(run, 1e-5)
    for kind, fact in (("step", "loss"), ("step", "norm"), ("evaluate", "loss")):
        found = told(together / name, kind, fact)
        expected = told(alone / run, kind, fact)
        looser = 10 if fact == "norm" else 1
        assert found == pytest.approx(expected, abs=looser * tolerance), fact
    assert len(told(together / name, "step", "loss")) == RUNS[run][1].steps


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOLERANCES])
def test_weights_are_those_of_one_process(alone: Path, together: Path, name: str) -> None:
    """Whole, in the model's own order, whatever part of them each process had."""
    expected = torch.load(alone / name.partition(":")[0] / "weights.pt")
    found = torch.load(together / name / "weights.pt")
    assert list(found) == list(expected)
    for key, weight in expected.items():
        # AdamW divides by the root of what may be next to nothing.
        torch.testing.assert_close(found[key], weight, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_what_another_mesh_left(together: Path, name: str) -> None:
    assert told(together / name, "resume", "step")[-1] == 10


def test_one_process_goes_on_with_what_a_pipeline_left(
    alone: Path, together: Path, tmp_path: Path
) -> None:
    for name in ("deep:pipeline=2,interleave=2", "mixture"):
        run = name.partition(":")[0]
        rewind(together / name, tmp_path / run, 10)
        train(tmp_path, run, ALONE)
        expected = told(alone / run, "step", "loss")
        assert told(tmp_path / run, "step", "loss") == pytest.approx(expected, abs=1e-5)
        assert told(tmp_path / run, "resume", "step") == [10]
