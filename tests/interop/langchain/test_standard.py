"""LangChain's own standard tests of chat models: in this process, and over HTTP."""

from pathlib import Path
from typing import Any

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from xverse.interop.langchain import ChatXverse

# The suites have plain and async tests side by side.
pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.filterwarnings("ignore:.*is marked with .@pytest.mark.asyncio."),
]


class InProcess:
    """The model in this process."""

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


class OverHttp:
    """The model behind a server, which knows it by one name only: there is no override."""

    @pytest.fixture(autouse=True)
    def _address(self, base_url: str) -> None:
        self.base_url = base_url

    @property
    def chat_model_class(self) -> type[ChatXverse]:
        return ChatXverse

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "tiny", "base_url": self.base_url, "api_key": "secret-key"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        params = {"model": "tiny", "base_url": self.base_url}
        return {"XVERSE_API_KEY": "secret-key"}, params, {"api_key": "secret-key"}


class TestUnitInProcess(InProcess, ChatModelUnitTests):
    """What needs no answer of the model."""


class TestIntegrationInProcess(InProcess, ChatModelIntegrationTests):
    """What the model answers."""


class TestUnitOverHttp(OverHttp, ChatModelUnitTests):
    """What needs no answer of the server."""


class TestIntegrationOverHttp(OverHttp, ChatModelIntegrationTests):
    """What the server answers."""
