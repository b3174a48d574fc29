"""Packed blocks: bit for bit ggml's own where there is a reference, near the numbers elsewhere."""

import pytest
import torch

from xverse.checkpoint.gguf_blocks import kind_named
from xverse.checkpoint.gguf_pack import PACKERS, pack

# The largest error of normal numbers, as the root of the mean square: measured, and 3 % of it more.
ERRORS = {"F32": 1e-9, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 5.6e-3, "Q5_0": 0.0447, "Q4_0": 0.0905,
          "Q4_K": 0.0770, "Q6_K": 0.0177}  # fmt: skip


def weights(rows: int = 64) -> torch.Tensor:
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1] = 3.0
    x[2] = -2.0
    x[3] = x[3].abs()
    x[4] = -x[4].abs()
    x[5, :32] = 0
    x[6, 32:] *= 1e-5
    return x


def unpacked(kind: str, x: torch.Tensor) -> torch.Tensor:
    known = kind_named(kind)
    packed = pack(kind, x.reshape(-1, known.elements))
    assert packed.dtype == torch.uint8
    assert packed.shape == (x.numel() // known.elements, known.nbytes)
    return known.unpack(packed).view(x.shape)


@pytest.mark.parametrize("kind", PACKERS)
def test_numbers_come_back_as_near_as_the_kind_allows(kind: str) -> None:
    x = weights()
    got = unpacked(kind, x)
    ordinary = slice(7, None)
    error = (got - x)[ordinary].square().mean().sqrt() / x[ordinary].square().mean().sqrt()
    assert float(error) < ERRORS[kind]
    assert torch.equal(got[0], x[0])
    assert torch.allclose(got[1:3], x[1:3], rtol=2e-3)
    assert not got[5, :32].any()


@pytest.mark.parametrize("kind", PACKERS)
def test_another_decoder_reads_the_same(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf")
    x = weights()
    known = kind_named(kind)
    packed = pack(kind, x.view(-1, known.elements))
    number = getattr(gguf.GGMLQuantizationType, kind)
    theirs = torch.from_numpy(gguf.quants.dequantize(packed.numpy().reshape(64, -1), number))
    assert torch.equal(theirs.float(), known.unpack(packed).view(64, 256))


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q5_0", "Q4_0"])
def test_another_encoder_writes_the_same_bits(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf")
    x = weights(512)
    number = getattr(gguf.GGMLQuantizationType, kind)
    theirs = torch.from_numpy(gguf.quants.quantize(x.numpy(), number))
    ours = pack(kind, x.view(-1, kind_named(kind).elements))
    assert torch.equal(theirs.reshape(ours.shape), ours)


def test_a_group_too_small_for_its_block_becomes_its_mean() -> None:
    x = torch.full((1, 256), -1e-4)
    x[0, ::2] = -2e-4
    x[0, 32] = 100.0
    got = unpacked("Q4_K", x)
    assert float(got[0, 64:].max()) <= 0
    assert float((got - x)[0, 64:].abs().max()) <= 2e-4
