"""LangChain's own standard tests of chat models, in this process."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_tests")
pytest.importorskip("xgrammar")

from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from xverse.interop.langchain import ChatXverse


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:.*is marked with .@pytest.mark.asyncio.")
class TestUnitInProcess(ChatModelUnitTests):
    """What needs no answer of the model."""

    @pytest.fixture(autouse=True)
    def _folder(self, trained: Path) -> None:
        self.folder = trained

    @property
    def chat_model_class(self) -> type[ChatXverse]:
        return ChatXverse

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.folder), "dtype": "float32"}


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:.*is marked with .@pytest.mark.asyncio.")
class TestIntegrationInProcess(ChatModelIntegrationTests):
    """What the model answers."""

    @pytest.fixture(autouse=True)
    def _folder(self, trained: Path) -> None:
        self.folder = trained

    @property
    def chat_model_class(self) -> type[ChatXverse]:
        return ChatXverse

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(self.folder), "dtype": "float32"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return f"{self.folder}/."  # the same folder by another name: another model to LangChain
