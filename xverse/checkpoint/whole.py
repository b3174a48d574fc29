"""TARGET -> WHOLE OR NOT AT ALL. New folders and files, which take their names when complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xverse.errors import XverseError
from xverse.files import is_there


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name at the end, or is removed on a failure."""
    require_new(target)
    with disk_errors(target):
        aside = _aside(target)
        try:
            aside.mkdir(parents=True)
            yield aside
            if target.is_dir():
                target.rmdir()
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def require_new(target: Path) -> None:
    """Raise XverseError where `target` is anything but a name that is free, or an empty folder."""
    with disk_errors(target):
        if is_there(target) and not (target.is_dir() and not any(target.iterdir())):
            raise _there_already(target, "a folder")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A name beside `target` for a file that takes its name at the end, or is removed."""
    with disk_errors(target):
        if is_there(target):
            raise _there_already(target, "a file")
        aside = _aside(target)
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            aside.rename(target)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses becomes an XverseError."""
    try:
        yield
    except OSError as error:
        raise XverseError(
            f"{path} cannot be written.", str(error), "Check the disk's space and permissions."
        ) from error


def require_space(folder: Path, nbytes: int) -> None:
    """Raise XverseError unless the disk of `folder` has `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise XverseError(
            f"There is no room for the model in {folder}.",
            f"It needs {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.",
            "Free some space, or name a target on another disk.",
        )


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def _there_already(target: Path, kind: str) -> XverseError:
    return XverseError(
        f"{target} is there already.",
        "Converting would overwrite it.",
        f"Name {kind} that does not exist, or remove that one first.",
    )
