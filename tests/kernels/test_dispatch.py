"""The table of what computes a decode step, and why."""

import pytest
import torch

from xverse.kernels import dispatch, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_gets_the_reference_and_is_told_why() -> None:
    products, *attention = dispatch.table(CPU, torch.bfloat16)
    assert products.call is reference.multiply_rows
    plain = [reference.rotate_store_attend, reference.rotate_store, reference.attend_chunks]
    assert [choice.call for choice in attention] == 2 * plain
    assert all("this is cpu" in str(choice) for choice in (products, *attention))
    assert len({choice.operation for choice in attention}) == 6, "bf16 and FP8 are told apart"


def test_a_gpu_without_fp8_falls_back_for_fp8_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(dispatch, "_triton_is_here", lambda: True)
    choice = dispatch.attend_chunks(CUDA, torch.bfloat16, fp8=True)
    assert choice.call is reference.attend_chunks
    assert "first with FP8" in choice.reason
    pytest.importorskip("triton")
    assert dispatch.attend_chunks(CUDA, torch.bfloat16).call is not reference.attend_chunks


@pytest.mark.parametrize(
    ("capability", "dtype", "triton", "why"),
    [
        ((7, 5), torch.float16, True, "capability"),
        ((9, 0), torch.float32, True, "float32"),
        ((9, 0), torch.bfloat16, False, "not installed"),
    ],
)
def test_a_gpu_that_falls_back_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    dtype: torch.dtype,
    triton: bool,
    why: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(dispatch, "_triton_is_here", lambda: triton)
    dispatch.warn_once.cache_clear()
    for _ in range(2):
        choice = dispatch.multiply_rows(CUDA, dtype)
        assert choice.call is reference.multiply_rows
        assert why in choice.reason
    assert sum(why in record.message for record in caplog.records) == 1


def test_a_large_batch_is_for_cublas_and_no_cause_for_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(dispatch, "_triton_is_here", lambda: True)
    choice = dispatch.multiply_rows(CUDA, torch.bfloat16, 17)
    assert choice.call is reference.multiply_rows
    assert "17 tokens" in choice.reason
    assert not caplog.records
