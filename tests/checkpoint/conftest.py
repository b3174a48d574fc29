"""Fixtures of this room's tests: a running fake hub, and the log."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoint.fake_hubs import FakeHub, serve
from tests.checkpoint.pulls import repository
from xverse.checkpoint import hub_fetch


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    for name in list(os.environ):
        if name.startswith(("HF_", "MODELSCOPE_", "XVERSE_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    with serve(FakeHub(repository())) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hub_fetch, "WAIT_S", 0.01)
        yield running


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "xverse")
    return caplog
