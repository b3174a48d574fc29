"""FIXTURES. One set of pages for the tests of a module."""

from collections.abc import Iterator

import pytest

pytest.importorskip("gradio", reason='the pages need gradio: pip install "xverse-llm[web]"')

from tests.web.live import Echo, pages


@pytest.fixture(scope="package")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="package")
def address(echo: Echo) -> Iterator[str]:
    with pages(echo) as at:
        yield at
