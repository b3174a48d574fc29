"""What the README shows works: its Python runs, its commands are understood."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from xverse import XverseError
from xverse.checkpoint.resolve import resolve
from xverse.cli import verbs
from xverse.config import parse

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_python_runs(tmp_path: Path) -> None:
    try:
        resolve("smollm2")
    except XverseError as missing:
        pytest.skip(str(missing))
    assert blocks("python")
    for block in blocks("python"):
        file = tmp_path / "block.py"
        file.write_text(block, "utf-8")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, file], capture_output=True, text=True, env=environment, timeout=240
        )
        assert result.returncode == 0, result.stderr
        assert "Paris" in result.stdout


COMMANDS = [
    line.split("| ")[-1]
    for block in blocks("bash")
    for line in block.splitlines()
    if "xverse " in line and not line.startswith(("git", "#"))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line: str) -> None:
    program, verb, *args = shlex.split(line, comments=True)
    assert program == "xverse"
    assert verb in verbs()
    config = import_module(f"xverse.verbs.{verb.replace('-', '_')}").Config
    parse(config, args, prog=verb, description="")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.M)
    assert {"chat", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (ROOT / target).exists(), (page.name, target)
