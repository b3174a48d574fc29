"""FIXTURE. The trained model, as a folder and behind a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("langchain_tests")  # a dev extra, as those below
pytest.importorskip("xgrammar")

from tests.interop.langchain.trained_model import write_trained_folder
from tests.server.inside import inside


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that was taught a few conversations."""
    return write_trained_folder(tmp_path_factory.mktemp("trained") / "xverse-trained")


@pytest.fixture(scope="package")
def base_url(trained: Path) -> Iterator[str]:
    """Where a server has that model, by the name "tiny"."""
    with inside(trained, keys=("secret-key",)) as server:
        yield f"{server.url}/v1"
