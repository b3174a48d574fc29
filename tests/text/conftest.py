"""The tokenizers that tests of this room share: XVERSE's own, and a small one like it."""

import pytest

from tests.data import shared_data
from tests.text.tiny import write_tiny_tokenizer
from xverse.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def real() -> Tokenizer:
    return Tokenizer.load(shared_data("tokenizer/tokenizer.json"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    return Tokenizer.load(folder)
