"""PACKED BLOCKS -> NUMBERS. The GGUF kinds we read, and what a block of each is worth in fp32.

The layouts are ggml's (`ggml-common.h`, `ggml-quants.c`). The K kinds cut a block of 256 elements
into groups, each with a small integer scale of its own. Offsets below are bytes within a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One way to store numbers: every `nbytes` bytes hold a block of `elements` of them."""

    name: str
    elements: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor]  # uint8 [blocks, nbytes] -> fp32 [blocks, elements]
    dtype: torch.dtype = torch.float32  # as stored, or for quantized kinds as computed


def _f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    """d f16 | 32 int8; w = d * q."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    """d f16 | 16 bytes of nibbles; w = d * (q - 8)."""
    return _nibbles(blocks[:, 2:], 16).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """d f16 | m f16 | 16 bytes of nibbles; w = d * q + m."""
    return _nibbles(blocks[:, 4:], 16).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    """d f16 | 32 fifth bits | 16 bytes of nibbles; w = d * (q - 16)."""
    q = _nibbles(blocks[:, 6:], 16) | _bits(blocks[:, 2:6]) << 4
    return q.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    """d f16 | m f16 | 32 fifth bits | 16 bytes of nibbles; w = d * q + m."""
    q = _nibbles(blocks[:, 8:], 16) | _bits(blocks[:, 4:8]) << 4
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q4_k(blocks: Tensor) -> Tensor:
    """d f16 | dmin f16 | 12 bytes of scales | 128 bytes of nibbles."""
    scale, minimum = _scales_k(blocks)
    q = _nibbles(blocks[:, 16:], 32).view(-1, 8, 32)
    return q.float().mul_(scale).sub_(minimum).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits (bit g of byte i: element i of group g) at 16."""
    scale, minimum = _scales_k(blocks)
    fifth = blocks[:, None, 16:48] >> _shifts(range(8)) & 1
    q = _nibbles(blocks[:, 48:], 32).view(-1, 8, 32) | fifth << 4
    return q.float().mul_(scale).sub_(minimum).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of nibbles | 64 bytes of upper bit pairs | 16 int8 scales | d f16."""
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _shifts(range(0, 8, 2)) & 3
    q = _nibbles(blocks[:, :128], 64).view(-1, 2, 4, 32) | upper << 4
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return q.view(-1, 16, 16).float().sub_(32).mul_(scale[:, :, None]).view(-1, 256)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The f16 at byte `at` of every block, as fp32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """Halves of bytes, [blocks, 2 * bytes]: of every `group` bytes first the low ones."""
    packed = packed.reshape(len(packed), -1, group)
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def _bits(packed: Tensor) -> Tensor:
    """Single bits of 4 bytes, lowest first, uint8 [blocks, 32]."""
    return (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _shifts(steps: range) -> Tensor:
    return torch.tensor(steps, dtype=torch.uint8)[:, None]


def _scales_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of the 8 groups of a Q4_K or Q5_K block, each fp32 [blocks, 8, 1].

    16 six-bit numbers in the 12 bytes at 4: scales 0-3 and minima 0-3 are the low six bits of
    bytes 0-7; scales 4-7 and minima 4-7 have their low four bits in the nibbles of bytes 8-11, and
    their top two in the spare bits of bytes 0-3 and 4-7.
    """
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scale = torch.cat((first & 63, third & 15 | first >> 2 & 48), dim=1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 2 & 48), dim=1)
    return (
        scale.float().mul_(_half(blocks, 0))[:, :, None],
        minimum.float().mul_(_half(blocks, 2))[:, :, None],
    )


# By the number that stands for the kind in a file (`enum ggml_type`).
KINDS = {
    0: Kind("F32", 1, 4, _f32),
    1: Kind("F16", 1, 2, _f16, torch.float16),
    2: Kind("Q4_0", 32, 18, _q4_0),
    3: Kind("Q4_1", 32, 20, _q4_1),
    6: Kind("Q5_0", 32, 22, _q5_0),
    7: Kind("Q5_1", 32, 24, _q5_1),
    8: Kind("Q8_0", 32, 34, _q8_0),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q5_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    30: Kind("BF16", 1, 2, _bf16, torch.bfloat16),
}


def kind_named(name: str) -> Kind:
    """The kind called `name`, which must be one of `KINDS`."""
    return next(kind for kind in KINDS.values() if kind.name == name)


# Kinds that exist and that we do not read, so that an error can call them by name.
OTHER_KINDS = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
