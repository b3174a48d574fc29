"""Where tests find real data: the folder $XVERSE_DATA, else ../shared/data beside the checkout."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared_data(name: str) -> Path:
    """Path of the data file or folder `name`; the test is skipped where it is absent."""
    folder = Path(os.environ.get("XVERSE_DATA", ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"real data not here: {path} (set XVERSE_DATA to the folder that has it)")
    return path
