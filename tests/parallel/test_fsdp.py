"""FSDP2 over two processes and gloo: the losses of one process, and checkpoints for any number."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.fsdp_ranks import RUNS, train
from tests.train.tiny import ALONE
from xverse.device import child_environment
from xverse.train.journal import last_steps, read_events

pytestmark = pytest.mark.timeout(900)


def torchrun(folder: Path, *names: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "tests.parallel.fsdp_ranks", str(folder), *names]
    result = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        timeout=850,  # 15 s on a machine with nothing else to do
    )
    assert result.returncode == 0, result.stderr[-4000:]


def losses(folder: Path, name: str) -> list[float]:
    path = folder / name / "metrics.jsonl"
    return [facts["loss"] for facts in last_steps(read_events(path))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        train(folder, name, ALONE)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> Path:
    """All runs over two processes; "dense" goes on from what one process left at step 10."""
    folder = tmp_path_factory.mktemp("together")
    for step in (15, 20):
        shutil.rmtree(alone / "dense" / "checkpoints" / f"step-{step:08}")
    shutil.copytree(alone / "dense", folder / "dense")
    torchrun(folder, *RUNS)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(alone: Path, together: Path, name: str) -> None:
    # Muon makes small directions as large as others, and the last bits of a sum with them.
    tolerance = {"bf16": 0.01, "muon": 5e-3}.get(name, 1e-5)
    assert losses(together, name) == pytest.approx(losses(alone, name), abs=tolerance)
    assert len(losses(together, name)) == RUNS[name][1].steps


def test_one_process_goes_on_with_what_two_left(
    alone: Path, together: Path, tmp_path: Path
) -> None:
    shutil.copytree(together / "mixture", tmp_path / "mixture")
    for step in (15, 20):
        shutil.rmtree(tmp_path / "mixture" / "checkpoints" / f"step-{step:08}")
    train(tmp_path, "mixture", ALONE)
    assert losses(tmp_path, "mixture") == pytest.approx(losses(alone, "mixture"), abs=1e-5)


def test_two_processes_went_on_with_what_one_left(together: Path) -> None:
    events = [
        e for e in read_events(together / "dense" / "metrics.jsonl") if e["event"] == "resume"
    ]
    assert [event["step"] for event in events] == [10]
