"""FIXTURE. The trained model, as a folder and in a server of its own."""

from pathlib import Path

import pytest

from tests.interop.langchain.trained_model import write_trained_folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that was taught a few conversations."""
    return write_trained_folder(tmp_path_factory.mktemp("trained") / "xverse-trained")
