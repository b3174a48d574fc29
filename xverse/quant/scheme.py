"""WHAT SMALLER MEANS. A quantization scheme: how many bits, and who shares a scale."""

from dataclasses import dataclass
from typing import Literal

from xverse.errors import XverseError

LEAST_GROUP = 8  # columns of int4 that share 32 bits; what a cut over devices may come to


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded: w = (q - zero) * scale, with a scale for each row or group.

    `group_size` columns of a row share a scale; None is one for the whole row. Symmetric schemes
    have no zero. "float" is 8 bits of e4m3 with a scale for each row. `Scheme(8)` and `Scheme(4)`
    are what `model.quantize(8 | 4)` always was: scale = max|row| / (2^(bits-1) - 1).
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    kind: Literal["int", "float"] = "int"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise XverseError(
                f"Weights cannot be quantized to {self.bits!r:.60} bits.",
                "The schemes are those of 8 and of 4 bits.",
                "Call quantize(8) or quantize(4).",
            )
        size = self.group_size
        if size is not None and (type(size) is not int or size < LEAST_GROUP or size % 8):
            raise XverseError(
                f"Groups cannot have {size!r:.60} columns.",
                f"It takes a multiple of 8 from {LEAST_GROUP} on.",
                "Use 128, 64 or 32, or no groups: one scale for each row.",
            )
        if self.kind == "float" and (self.bits, size, self.symmetric) != (8, None, True):
            raise XverseError(
                f"There is no such floating point scheme: {self.bits} bits, groups of {size}.",
                "fp8 has 8 bits, and one scale for each row.",
                'Use the scheme "fp8", or integers.',
            )

    @property
    def largest(self) -> int:
        """The largest number a weight can be stored as: 127, 7 or (fp8) 448."""
        return 448 if self.kind == "float" else 2 ** (self.bits - 1) - 1

    @property
    def smallest(self) -> int:
        """The smallest one; a row's own scale (the published scheme) leaves -128 and -8 unused."""
        unused = self.kind == "float" or (self.symmetric and self.group_size is None)
        return -self.largest if unused else -self.largest - 1

    def __str__(self) -> str:
        if self.kind == "float":
            return "fp8"
        groups = "per row" if self.group_size is None else f"in groups of {self.group_size}"
        return f"int{self.bits} {groups}" + ("" if self.symmetric else ", asymmetric")
