import math
import struct

import numpy as np
import pytest
import torch

from xverse.checkpoint.gguf_blocks import KINDS, OTHER_KINDS, kind_named

QUANTIZED = [kind.name for kind in KINDS.values() if kind.elements > 1]

# Where the f16 scales lie in a block: random bytes there would be NaN or huge now and then.
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    kind, random = kind_named(name), np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, kind.nbytes), dtype=np.uint8)
    for at in SCALES.get(name, (0,)) if kind.elements > 1 else ():
        scale = random.standard_normal(count).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks


@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_are_worth_what_the_reference_says_bit_for_bit(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(name, 500)
    number = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.dequantize(blocks, number).reshape(-1)
    values = kind_named(name).unpack(torch.from_numpy(blocks)).numpy().reshape(-1)
    assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_kinds_have_the_numbers_and_sizes_of_the_reference() -> None:
    gguf = pytest.importorskip("gguf")
    for number, kind in KINDS.items():
        official = gguf.GGMLQuantizationType(number)
        assert (official.name, gguf.GGML_QUANT_SIZES[official]) == (
            kind.name,
            (kind.elements, kind.nbytes),
        )
    for number, name in OTHER_KINDS.items():
        assert gguf.GGMLQuantizationType(number).name == name


def half(block: bytes, at: int) -> float:
    value: float = struct.unpack_from("<e", block, at)[0]
    return value


def scalar_q4_1(block: bytes) -> list[float]:
    scale, minimum = half(block, 0), half(block, 2)
    low = [scale * (byte & 15) + minimum for byte in block[4:]]
    return low + [scale * (byte >> 4) + minimum for byte in block[4:]]


def scalar_q5_0(block: bytes) -> list[float]:
    scale, fifth = half(block, 0), int.from_bytes(block[2:6], "little")
    q = [byte & 15 for byte in block[6:]] + [byte >> 4 for byte in block[6:]]
    return [scale * (q[i] + 16 * (fifth >> i & 1) - 16) for i in range(32)]


def scalar_q4_k(block: bytes) -> list[float]:
    scale, minimum, packed = half(block, 0), half(block, 2), block[4:16]
    out = []
    for group in range(8):
        if group < 4:
            s, m = packed[group] & 63, packed[group + 4] & 63
        else:
            s = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            m = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
        for i in range(32):
            byte = block[16 + group // 2 * 32 + i]
            out.append(scale * s * (byte >> 4 if group % 2 else byte & 15) - minimum * m)
    return out


def scalar_q6_k(block: bytes) -> list[float]:
    scale = half(block, 208)
    scales = struct.unpack_from("16b", block, 192)
    out = []
    for i in range(256):
        part, place = divmod(i, 128)  # each half of the block: four rows of 32
        row, column = divmod(place, 32)
        low = block[part * 64 + row % 2 * 32 + column]
        low = low >> 4 if row >= 2 else low & 15
        high = block[128 + part * 32 + column] >> 2 * row & 3
        out.append(scale * scales[i // 16] * ((low | high << 4) - 32))
    return out


@pytest.mark.parametrize(
    ("name", "scalar"),
    [("Q4_1", scalar_q4_1), ("Q5_0", scalar_q5_0), ("Q4_K", scalar_q4_k), ("Q6_K", scalar_q6_k)],
)
def test_blocks_agree_with_a_scalar_reading(name: str, scalar: object) -> None:
    assert callable(scalar)
    blocks = random_blocks(name, 20, seed=1)
    values = kind_named(name).unpack(torch.from_numpy(blocks))
    for row, block in zip(values.tolist(), blocks, strict=True):
        assert row == pytest.approx(scalar(block.tobytes()), rel=1e-5, abs=1e-5)


def test_a_block_written_by_hand() -> None:
    q8_0 = struct.pack("<e32b", 0.5, *range(-16, 16))
    values = kind_named("Q8_0").unpack(torch.frombuffer(bytearray(q8_0), dtype=torch.uint8)[None])
    assert values.tolist() == [[i / 2 for i in range(-16, 16)]]


@pytest.mark.parametrize("fill", [0, 0x7F, 0xFF])
def test_extreme_bytes_are_only_numbers(fill: int) -> None:
    for kind in KINDS.values():
        blocks = torch.full((3, kind.nbytes), fill, dtype=torch.uint8)
        values = kind.unpack(blocks)
        assert (values.shape, values.dtype) == ((3, kind.elements), torch.float32)
        assert fill or math.isclose(float(values.abs().max()), 0.0)
