"""FOLDER -> TURNS. One run at a time works in a folder; helpers of a killed run don't count."""

import os
from pathlib import Path
from typing import IO

_held: dict[Path, IO[bytes]] = {}


def wait_for_turn(folder: Path) -> None:
    """Return when no other process holds `folder`: the workers of a run that was killed ended."""
    _lock(folder, shared=False).close()


def hold(folder: Path) -> None:
    """Keep others waiting for `folder` until `let_go`, or until this process ends."""
    if folder not in _held:
        _held[folder] = _lock(folder, shared=True)


def let_go(folder: Path) -> None:
    """Give this process's share back."""
    if folder in _held:
        _held.pop(folder).close()


def _lock(folder: Path, *, shared: bool) -> IO[bytes]:
    file = (folder / "lock").open("a+b")
    if os.name == "posix":
        import fcntl

        # A record lock is not inherited: helpers that outlive a killed run don't keep it.
        fcntl.lockf(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    return file
