"""The arithmetic of training: what is fused, chunked or 8 bits wide against its specification."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels import (
    attend,
    multiply_fp8,
    native,
    reference,
    reference_train,
    score,
    update_cpu,
)
from xverse.kernels.reference_train import AdamW
from xverse.kernels.score import cross_entropy
from xverse.model.cache import Packed


@pytest.mark.parametrize("rows", [None, 32, 70, 1])
@pytest.mark.parametrize("z_factor", [0.0, 1e-2])
def test_the_loss_in_chunks_is_the_loss(rows: int | None, z_factor: float) -> None:
    torch.manual_seed(0)
    x_TD, head_VD = torch.randn(70, 16), torch.randn(50, 16)
    targets_T, mask_T = torch.randint(0, 50, (70,)), torch.rand(70) > 0.3
    found = []
    for chunked in (True, False):
        x, head = x_TD.clone().requires_grad_(), head_VD.clone().requires_grad_()
        if chunked:
            loss, z = cross_entropy(x, head, targets_T, mask_T, z_factor=z_factor, rows=rows)
            (loss * 0.5).backward()
        else:
            loss, z = reference_train.cross_entropy(x, head, targets_T, mask_T)
            ((loss + z_factor * z) * 0.5).backward()
        found.append((loss.detach(), z.detach(), x.grad, head.grad))
    for ours, specified in zip(*found, strict=True):
        torch.testing.assert_close(ours, specified, atol=1e-5, rtol=1e-5)


def test_the_loss_of_bf16_and_of_extreme_logits() -> None:
    torch.manual_seed(0)
    x_TD = (torch.randn(40, 32) * 8).bfloat16().requires_grad_()
    head_VD = (torch.randn(300, 32) * 8).bfloat16()
    targets_T, mask_T = torch.randint(0, 300, (40,)), torch.ones(40, dtype=torch.bool)
    loss, _ = cross_entropy(x_TD, head_VD, targets_T, mask_T, rows=16)
    loss.backward()
    wanted, _ = reference_train.cross_entropy(x_TD.detach(), head_VD, targets_T, mask_T)
    torch.testing.assert_close(loss.detach(), wanted)
    assert x_TD.grad is not None
    assert x_TD.grad.isfinite().all()


def test_nothing_counted_is_no_loss_and_no_gradient() -> None:
    x_TD = torch.randn(8, 4, requires_grad=True)
    nothing = torch.zeros(8, dtype=torch.bool)
    loss, _ = cross_entropy(x_TD, torch.randn(5, 4), torch.zeros(8, dtype=torch.int64), nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert x_TD.grad is not None
    assert not x_TD.grad.any()


def test_a_frozen_head_gets_no_gradient_and_none_is_made_without_need() -> None:
    head_VD = torch.randn(5, 4)
    mask_T = torch.ones(8, dtype=torch.bool)
    with torch.no_grad():
        loss, _ = cross_entropy(torch.randn(8, 4), head_VD, torch.zeros(8).long(), mask_T)
    assert not loss.requires_grad
    assert head_VD.grad is None


@pytest.mark.parametrize("documents", [(4, 4, 4), (5, 7), (12,), (1, 11), (1,) * 12])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_documents_in_a_row(documents: tuple[int, ...], kv_heads: int) -> None:
    torch.manual_seed(1)
    q_THE = torch.randn(12, 4, 8)
    k_TKE, v_TKE = torch.randn(2, 12, kv_heads, 8)
    wanted = reference_train.attend_documents(q_THE, k_TKE, v_TKE, documents)
    for found in (
        attend.attend_documents(q_THE, k_TKE, v_TKE, documents),
        Packed(documents).attend(0, q_THE, k_TKE, v_TKE),
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    start = 0
    for length in documents:
        here = slice(start, start + length)
        alone = reference.attend(q_THE[here], k_TKE[here], v_TKE[here])
        torch.testing.assert_close(wanted[here], alone)
        start += length


RULE = AdamW(rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, decay=0.1, step=3, scale=0.5, seed=99)


@pytest.mark.parametrize(
    ("weight", "moments"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("size", [1, 3001])
def test_the_update_on_a_gpu_is_the_specification(
    weight: torch.dtype, moments: torch.dtype, size: int
) -> None:
    pytest.importorskip("triton")
    from xverse.kernels import update_triton

    torch.manual_seed(2)
    start = [
        torch.randn(size).to(weight),
        torch.randn(size).bfloat16(),
        (torch.randn(size) * 0.1).to(moments),
        (torch.rand(size) * 0.1).to(moments),
    ]
    copy = torch.zeros(size, dtype=torch.bfloat16) if weight == torch.float32 else None
    found = []
    for call in (update_triton.adamw, reference_train.adamw):
        tensors = [tensor.clone() for tensor in start]
        own = None if copy is None else copy.clone()
        call(*tensors, RULE, own)
        found.append(tensors if own is None else [*tensors, own])
    for ours, specified in zip(*found, strict=True):
        # One unit in bf16's last place, where a sum a bit apart falls to the other side.
        tolerance = 2**-7 if ours.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(ours, specified, atol=1e-6, rtol=tolerance)


F32, BF16 = torch.float32, torch.bfloat16


def of_kinds(
    weight: torch.dtype, gradient: torch.dtype, moments: torch.dtype
) -> list[torch.Tensor]:
    """Weight, gradient, moments, and for a master a copy in bf16; several pieces of numbers."""
    generator = torch.Generator().manual_seed(4)
    size = (7, 4801)
    found = [
        torch.randn(size, generator=generator).to(weight),
        torch.randn(size, generator=generator).to(gradient),
        (torch.randn(size, generator=generator) * 0.1).to(moments),
        (torch.rand(size, generator=generator) * 0.1).to(moments),
    ]
    return [*found, torch.zeros(size, dtype=BF16)] if weight == F32 else found


def updated(
    call: Callable[..., None], given: list[torch.Tensor], rule: AdamW, here: slice = slice(None)
) -> list[torch.Tensor]:
    tensors = [tensor.flatten()[here].clone() for tensor in given]
    call(*tensors[:4], rule, *tensors[4:])
    return tensors


@pytest.mark.parametrize("weight", [F32, BF16])
@pytest.mark.parametrize("gradient", [F32, BF16])
@pytest.mark.parametrize("moments", [F32, BF16])
def test_the_update_on_a_cpu_is_the_specification(
    weight: torch.dtype,
    gradient: torch.dtype,
    moments: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(update_cpu, "PIECE", 1000)
    given = of_kinds(weight, gradient, moments)
    specified = updated(reference_train.adamw, given, RULE)
    assert all(map(torch.equal, updated(update_cpu.adamw_in_pieces, given, RULE), specified))
    if native.why_not():
        pytest.skip(native.why_not())
    ours = updated(update_cpu.adamw, given, RULE)
    for one, other in zip(ours, specified, strict=True):
        # One unit in bf16's last place, where a sum a bit apart falls to the other side.
        tolerance = 2**-7 if one.dtype == BF16 else 1e-6
        torch.testing.assert_close(one, other, atol=1e-6, rtol=tolerance)
        assert (one != other).float().mean() < 0.01
    for cut in (1, 16_384, 20_000):  # a piece is rounded as its place in the whole is
        first = updated(update_cpu.adamw, given, RULE, slice(0, cut))
        rest = updated(update_cpu.adamw, given, RULE._replace(start=cut), slice(cut, None))
        assert all(map(torch.equal, map(torch.cat, zip(first, rest, strict=True)), ours))


def test_random_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    x = torch.full((100_000,), 1.0 + 2**-9)  # a quarter of the way
    rounded = reference_train.round_randomly(x, 5).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(1.0 + 2**-9, abs=1e-4)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(reference_train.round_randomly(exact.float(), 1), exact)
    other = reference_train.round_randomly(x, 6).float()
    assert 0.3 < (rounded != other).float().mean() < 0.45  # by chance: 2 x 1/4 x 3/4


def test_singular_values_go_to_one() -> None:
    torch.manual_seed(3)
    for shape in ((40, 20), (20, 40), (3, 24, 24)):
        values = torch.linalg.svdvals(reference_train.orthogonalize(torch.randn(shape)))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_linear_layers_in_eight_bits() -> None:
    torch.manual_seed(4)
    x_TD, w_ND, g_TN = torch.randn(32, 64), torch.randn(48, 64), torch.randn(32, 48) * 1e-4
    x, w = x_TD.clone().requires_grad_(), w_ND.clone().requires_grad_()
    y_TN = multiply_fp8.linear_fp8(x, w)
    y_TN.backward(g_TN)
    torch.testing.assert_close(y_TN.detach(), reference_train.multiply_fp8(x_TD, w_ND))
    wanted = reference_train.multiply_fp8(g_TN, w_ND.T, gradient=True)
    assert x.grad is not None
    assert w.grad is not None
    torch.testing.assert_close(x.grad, wanted, atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(
        w.grad, reference_train.multiply_fp8(g_TN.T, x_TD.T, gradient=True), atol=1e-8, rtol=1e-5
    )
    exact = x_TD @ w_ND.T
    assert ((y_TN - exact).norm() / exact.norm()).item() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "apart"), [(100, 128), (97, 97), (9000, 9024)])
def test_the_loss_on_a_gpu_is_the_specification(
    dtype: torch.dtype, columns: int, apart: int
) -> None:
    pytest.importorskip("triton")
    from xverse.kernels import score_triton

    torch.manual_seed(5)
    room = torch.full((6, apart), float("nan"), dtype=dtype)  # padding has anything in it
    logits_TV = room[:, :columns]
    logits_TV.copy_(torch.randn(6, columns) * 20)
    targets_T = torch.tensor([0, columns - 1, 5, 7, 9, 50])
    mask_T = torch.tensor([True, True, False, True, True, True])
    wanted = reference_train.score_logits(logits_TV.clone(), targets_T, mask_T, 1e-2)
    found = score_triton.score_logits(logits_TV, targets_T, mask_T, 1e-2)
    assert found[2].data_ptr() == room.data_ptr()  # in place
    for ours, specified in zip(found, wanted, strict=True):
        tolerance = 2**-7 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, specified, atol=1e-5, rtol=tolerance)
    if apart > columns:
        assert not room[:, columns:].any()  # as products that read it whole need


def test_a_last_row_that_ends_the_memory_is_not_read_beyond() -> None:
    pytest.importorskip("triton")
    from xverse.kernels import score_triton

    room = torch.randn(256)
    inner, last = (room.as_strided((1, 100), (128, 1), place) for place in (100, 156))
    assert score_triton._readable(inner) == 128
    assert score_triton._readable(last) == 100
    before = room[:156].clone()
    wanted = reference_train.score_logits(last.clone(), torch.tensor([3]), torch.tensor([True]), 0)
    found = score_triton.score_logits(last, torch.tensor([3]), torch.tensor([True]), 0.0)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(room[:156], before)


def test_rows_of_logits_are_even_and_fit() -> None:
    assert score.chunk_rows(16384, 100534, in_place=True) == 4096
    assert score.chunk_rows(16384, 100534, in_place=False) == 2560
    assert score.chunk_rows(70, 50, in_place=False) == 256
    for tokens in (1, 255, 5000, 8192, 30000):
        rows = score.chunk_rows(tokens, 100534, in_place=True)
        assert rows % score.STEP == 0
        assert rows * 100534 <= 2 * score.LOGITS


@pytest.mark.parametrize("in_place", [False, True])
def test_a_head_made_wider_gives_the_same_loss(
    monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """As on a GPU, where rows of zeros make products of round sizes."""

    def scorer(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, z_loss, gradient = reference_train.score_logits(logits.clone(), *others)
        if not in_place:
            return loss, z_loss, gradient
        logits.as_strided((len(logits), 1024), (1024, 1)).zero_()
        return loss, z_loss, logits.copy_(gradient)

    torch.manual_seed(0)
    x_TD, head_VD = (torch.randn(rows, 32, requires_grad=True) for rows in (300, 1006))
    targets_T, mask_T = torch.randint(0, 1006, (300,)), torch.rand(300) > 0.3
    found = []
    for wider in (0, 18):
        monkeypatch.setattr(
            score, "_wide", lambda head, more=wider: functional.pad(head, (0, 0, 0, more))
        )
        loss, _ = cross_entropy(
            x_TD, head_VD, targets_T, mask_T, z_factor=1e-3, rows=256,
            scorer=scorer if wider else None,
        )  # fmt: skip
        found.append((loss, *torch.autograd.grad(loss, (x_TD, head_VD))))
    torch.testing.assert_close(found[0], found[1])
