"""FIXTURES. One small model for all tests of the server, and one server that has it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.server.inside import Inside, inside
from tests.tiny_model import write_published_folder


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(path)
    return path


@pytest.fixture(scope="package")
def server(folder: Path) -> Iterator[Inside]:
    with inside(folder) as found:
        yield found


@pytest.fixture(scope="package")
def http(server: Inside) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="package")
def client(server: Inside) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
