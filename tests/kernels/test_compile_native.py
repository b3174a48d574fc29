"""Where nothing can be compiled the installation goes on, and says why."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from xverse.kernels import compile_native, native


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_native, "HERE", tmp_path)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the source is for Linux on x86-64")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CC", raising=False)
    assert compile_native.compile_all() == "there is no C compiler"


def test_on_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in compile_native.compile_all()


def test_a_compiler_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the source is for Linux on x86-64")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n", "utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert "no such thing" in compile_native.compile_all()
    assert [file.name for file in tmp_path.iterdir()] == ["cc"]


def test_what_was_not_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    native.load.cache_clear()
    try:
        assert "compiled nothing" in str(native.load("avx2"))
    finally:
        native.load.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native.variant() == ""
    assert "no AVX2" in str(native.load(""))
