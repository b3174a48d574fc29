"""UNTRUSTED PROGRAM -> PASSED OR NOT. Runs code that a model wrote where it can do no harm.

A process of its own (sandbox_child.py) without network, processes, signals or writable files: the
kernel refuses every system call that is not on a short list. Memory and time are bounded.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from xverse.errors import XverseError

CHILD = Path(__file__).with_name("sandbox_child.py")
MEMORY_BYTES, CPU_S, WALL_S = 1 << 30, 10, 20.0

# Everything a sandbox must refuse; each line leaves a mark in `broken` where it went through.
_PROBE = """
import os, socket
broken = []
def attempt(name, act):
    try: act()
    except (OSError, PermissionError): return
    broken.append(name)
attempt("network", lambda: socket.socket())
attempt("files", lambda: open("/tmp/xverse-sandbox-probe", "w"))
attempt("files", lambda: os.unlink("/tmp/xverse-sandbox-probe"))
attempt("processes", lambda: os.fork())
attempt("signals", lambda: os.kill(os.getppid(), 0))
assert not broken, broken
"""


@dataclass(frozen=True)
class Verdict:
    """Whether a program ran to its end; if not, `why`."""

    passed: bool
    why: str = ""


def run_program(
    program: str,
    *,
    memory_bytes: int = MEMORY_BYTES,
    cpu_s: int = CPU_S,
    wall_s: float = WALL_S,
) -> Verdict:
    """Run a Python program to its end, or to the end of its means.

    XverseError where no sandbox can be had here: nothing is run then.
    """
    require_sandbox()
    return _run(program, memory_bytes, cpu_s, wall_s)


@cache
def require_sandbox() -> None:
    """Try out that network, files, processes and signals are refused; XverseError if not."""
    why = "It is made of Linux's filters of system calls."
    if sys.platform == "linux":
        verdict = _run(_PROBE, MEMORY_BYTES, CPU_S, WALL_S)
        if verdict.passed:
            return
        why = f"A trial of it ended with: {verdict.why}"
    raise XverseError(
        "Code that a model wrote cannot be run here: no sandbox can be had.",
        why,
        "Run the task on a Linux machine (x86-64 or arm64) that allows seccomp, or leave it out.",
    )


def _run(program: str, memory_bytes: int, cpu_s: int, wall_s: float) -> Verdict:
    reading, writing = os.pipe()
    with contextlib.ExitStack() as ends:
        ends.callback(os.close, reading)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
                start_new_session=True,
                pass_fds=(writing,),
            )
        finally:
            os.close(writing)
        limits = {"memory_bytes": memory_bytes, "cpu_s": cpu_s}
        asked = {"program": program, "verdict_to": writing, **limits}
        try:
            process.communicate(json.dumps(asked).encode(), timeout=wall_s)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"not done after {wall_s:g} s")
        finally:
            process.kill()
            process.wait()
        said = os.read(reading, 4096) if process.returncode == 0 else b""
    return _verdict(said, process.returncode)


def _verdict(said: bytes, code: int) -> Verdict:
    if code < 0:
        return Verdict(False, f"ended by {signal.Signals(-code).name}")
    try:
        found = json.loads(said)
    except ValueError:
        return Verdict(False, f"left without a verdict (exit {code})")
    if not isinstance(found, dict):
        return Verdict(False, "left with a verdict that is none")
    return Verdict(found.get("passed") is True, str(found.get("error", "")))
