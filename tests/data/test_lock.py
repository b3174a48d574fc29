"""A folder is held by a process, not by what it leaves behind."""

import subprocess
import sys
from pathlib import Path

from xverse.data.lock import hold, let_go, wait_for_turn

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from pathlib import Path
from xverse.data.lock import hold
hold(Path(sys.argv[1]))
if os.fork() == 0:
    while os.getppid() != 1 and sys.stdin.read(1):
        pass
    os._exit(0)
print("held", flush=True)
time.sleep(600)
"""


def test_a_helper_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    """The child of a killed holder is alive, has the file open, and keeps nobody waiting."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
        wait_for_turn(tmp_path)  # waits for ever where the lock is inherited
        assert process.stdin is not None
        process.stdin.close()


def test_one_process_may_hold_and_let_go_again(tmp_path: Path) -> None:
    for _ in range(2):
        hold(tmp_path)
        hold(tmp_path)
        let_go(tmp_path)
    let_go(tmp_path)
    wait_for_turn(tmp_path)
