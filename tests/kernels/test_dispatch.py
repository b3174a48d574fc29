"""The table of what computes a decode step, and why."""

import importlib.util

import pytest
import torch

from xverse.kernels import (
    attend,
    attend_cpu,
    dispatch,
    dispatch_quantized,
    native,
    packed,
    reference,
    reference_experts,
    reference_few_bits,
    reference_packed,
    reference_sample,
    reference_steps,
    reference_train,
    update_cpu,
)
from xverse.log import warn_once

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_gets_the_reference_and_is_told_why() -> None:
    plain = [reference.rotate_store_attend, reference.rotate_store, reference.attend_chunks]
    calls = [choice.call for choice in dispatch.table(CPU, torch.bfloat16)]
    assert calls == [
        reference.multiply_rows,
        reference.embed_rows,
        *2 * [reference_few_bits.multiply_rows],
        reference_few_bits.embed_rows,
        reference.add_norm,
        reference.swiglu_joined,
        *2 * plain,
        reference.attend,
        *2 * [attend.attend_documents],
        reference_train.score_logits,
        update_cpu.adamw_in_pieces if native.why_not() else update_cpu.adamw,
        reference_sample.best_rows,
        reference_sample.sample_rows,
        reference_sample.mask_rows,
        reference_sample.penalize_rows,
        reference_sample.count_rows,
        reference_experts.mixture_rows,
        reference_experts.mix_experts,
        *6 * [reference_steps.multiply_steps],
        reference_steps.add_norm_rounded,
        reference_steps.swiglu_rounded,
        reference.add_parts,
        reference.gather_columns,
        *calls[-2:],
    ]
    compiled = [packed.PackedWeights.multiply, attend_cpu.store_attend]
    plain = [reference_packed.multiply_packed, reference.attend_pages]
    assert calls[-2:] == (plain if native.why_not() else compiled)
    assert all("this is cpu" in str(choice) for choice in dispatch.table(CPU, torch.bfloat16)[:-2])


def test_a_gpu_without_fp8_falls_back_for_fp8_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr("xverse.kernels.choice.triton_is_here", lambda: True)
    choice = dispatch.attend_chunks(CUDA, torch.bfloat16, fp8=True)
    assert choice.call is reference.attend_chunks
    assert "first with FP8" in choice.reason
    choice = dispatch_quantized.multiply_few_bits(CUDA, torch.bfloat16, fp8=True)
    assert choice.call is reference_few_bits.multiply_rows
    pytest.importorskip("triton")
    assert dispatch.attend_chunks(CUDA, torch.bfloat16).call is not reference.attend_chunks
    choice = dispatch_quantized.multiply_few_bits(CUDA, torch.bfloat16)
    assert choice.call is not reference_few_bits.multiply_rows
    choice = dispatch_quantized.multiply_few_bits(CUDA, torch.float16)
    assert "is not bfloat16" in choice.reason


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
    monkeypatch.setattr("xverse.kernels.choice.triton_is_here", lambda: triton)
    warn_once.cache_clear()
    for _ in range(2):
        choice = dispatch.multiply_rows(CUDA, dtype)
        assert choice.call is reference.multiply_rows
        assert why in choice.reason
    assert sum(why in record.message for record in caplog.records) == 1


def test_a_large_batch_is_for_cublas_and_no_cause_for_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("xverse.kernels.choice.triton_is_here", lambda: True)
    choice = dispatch.multiply_rows(CUDA, torch.bfloat16, 65)
    assert choice.call is reference.multiply_rows
    assert "65 tokens" in choice.reason
    assert not caplog.records


def test_experts_that_can_only_be_called_one_by_one_are_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("xverse.kernels.choice.triton_is_here", lambda: True)
    warn_once.cache_clear()
    choice = dispatch.mix_experts(CUDA, torch.bfloat16, "they are quantized")
    assert choice.call is reference_experts.mix_experts
    assert "they are quantized" in caplog.text
    if importlib.util.find_spec("triton") is not None:
        choice = dispatch.mix_experts(CUDA, torch.bfloat16)
        assert choice.call is not reference_experts.mix_experts


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
