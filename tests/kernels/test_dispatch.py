"""The table of what computes a decode step, and why."""

import pytest
import torch

from xverse.kernels import dispatch, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_gets_the_reference_and_is_told_why() -> None:
    products, attention, sums, gathers = dispatch.table(CPU, torch.bfloat16)
    assert products.call is reference.multiply_rows
    assert attention.call is reference.rotate_store_attend
    assert sums.call is reference.add_parts
    assert gathers.call is reference.gather_columns
    assert "this is cpu" in str(products)


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


@pytest.mark.parametrize(
    ("gpus", "linked", "why"), [(1, True, "one GPU"), (2, False, "cannot reach"), (2, True, "")]
)
def test_sums_need_gpus_that_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, gpus: int, linked: bool, why: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: linked)
    choice = dispatch.add_parts(CUDA, torch.bfloat16)
    assert (choice.call is reference.add_parts) == bool(why)
    assert (choice.implementation == "NCCL") == bool(why)
    assert why in choice.reason
