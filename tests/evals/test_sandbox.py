"""Code that a model wrote does no harm, whatever it tries; right code passes."""

import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.data import shared_data
from xverse.evals.item import Item
from xverse.evals.sandbox import run_program
from xverse.evals.tasks import all_tasks
from xverse.evals.tasks.writing import passes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
LITTLE = {"memory_bytes": 300 << 20, "cpu_s": 1, "wall_s": 60.0}

HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 80))",
    "file write": "open(FILE, 'w').write('x')",
    "file removal": "import os\nos.unlink(VICTIM)",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 26))",
    "endless loop": "while True: pass",
    "standard input": "import sys\nassert sys.stdin.read() == '', 'read'\ninput()",
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "signal to the parent": "import os\nos.kill(os.getppid(), 9)",
    "signal to all": "import os\nos.kill(-1, 9)",
    "program": "import subprocess\nsubprocess.run(['touch', FILE])",
    "mode": "import os\nos.chmod(VICTIM, 0o777)",
    "raised limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "traced parent": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_does_no_harm(name: str, tmp_path: Path) -> None:
    made, victim = tmp_path / "made", tmp_path / "victim"
    victim.write_text("precious")
    mode = victim.stat().st_mode
    names = f"FILE, VICTIM = {str(made)!r}, {str(victim)!r}\n"
    verdict = run_program(names + HOSTILE[name], **LITTLE)  # type: ignore[arg-type]
    assert not verdict.passed
    assert verdict.why
    assert not made.exists()
    assert (victim.read_text(), victim.stat().st_mode) == ("precious", mode)


def test_sleeping_code_is_ended() -> None:
    start = time.monotonic()
    verdict = run_program("import time\ntime.sleep(600)", wall_s=2.0)
    assert not verdict.passed
    assert time.monotonic() - start < 120


def test_nothing_of_the_environment_is_told() -> None:
    os.environ["A_SECRET"] = "x"
    try:
        assert run_program("import os\nassert 'A_SECRET' not in os.environ").passed
    finally:
        del os.environ["A_SECRET"]


def test_modules_can_be_read_and_strange_programs_end() -> None:
    assert run_program("import math, re, hashlib, heapq, collections\nmath.sqrt(2)").passed
    assert not run_program("def").passed
    assert not run_program("raise KeyboardInterrupt").passed


def canonical(step: int) -> list[tuple[Item, str]]:
    items = all_tasks()["humaneval"].items(shared_data("eval"))
    with gzip.open(shared_data("eval/humaneval/HumanEval.jsonl.gz"), "rt") as lines:
        solutions = [json.loads(line)["canonical_solution"] for line in lines]
    return list(zip(items, solutions, strict=True))[::step]


def test_canonical_solutions_pass_and_empty_ones_do_not() -> None:
    for item, solution in canonical(20):
        assert passes(item, solution) == 1.0
        assert passes(item, "") == 0.0


def test_a_whole_function_in_a_fence_is_taken() -> None:
    item, solution = canonical(164)[0]
    fenced = f"Here it is:\n```python\n{item.question}{solution}```\nIt works."
    assert passes(item, fenced) == 1.0


@pytest.mark.slow
def test_all_164_canonical_solutions_pass() -> None:
    assert sum(passes(item, solution) for item, solution in canonical(1)) == 164
    assert sum(passes(item, "    pass\n") for item, _ in canonical(1)) == 0
