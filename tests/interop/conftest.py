"""FIXTURE. Folders as published, dense and mixture of experts, made once for these tests."""

from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both folders, by "dense" and "moe"; tests leave them as they are."""
    home = tmp_path_factory.mktemp("published")
    for kind in ("dense", "moe"):
        write_published_folder(home / kind, moe=kind == "moe")
    return {kind: home / kind for kind in ("dense", "moe")}


@pytest.fixture(params=["dense", "moe"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """One of them, then the other."""
    return folders[request.param]
