"""FIGURES -> bench/results/*.json. One file a measurement, with what is needed to repeat it."""

import datetime
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from xverse.device import machine_name, pick_device

ROOT = Path(__file__).resolve().parents[1]


def record(name: str, figures: dict[str, object], packages: tuple[str, ...]) -> Path:
    """Write `figures` to bench/results/<name>.json, with command, commit, machine and date."""
    facts = {
        "command": " ".join(
            ["python -m", f"bench.{Path(sys.argv[0]).stem}", *map(_word, sys.argv[1:])]
        ),
        # A machine without the repository's history is told the commit.
        "commit": os.environ.get("XVERSE_COMMIT") or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_name(pick_device()),
        "packages": {package: _version(package) for package in ("torch", *packages)},
        "figures": figures,
    }
    file = ROOT / "bench" / "results" / f"{name}.json"
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return file


def _commit() -> str:
    """The commit that runs, and how many of its files were changed since."""
    changed = _git("status", "--porcelain", "--", "xverse", "bench").splitlines()
    changed = [line for line in changed if "bench/results/" not in line]
    return _git("rev-parse", "HEAD") + (f" and {len(changed)} changed files" if changed else "")


def _git(*args: str) -> str:
    return subprocess.run(
        ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _word(argument: str) -> str:
    """An argument; of a file, only its name: where it lies on one machine tells nobody anything."""
    return Path(argument).name if Path(argument).is_absolute() else argument
