"""TENSORS -> GGUF. Writes a GGUF file, version 3: header first, then one tensor after another."""

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from xverse.checkpoint.gguf_blocks import KINDS, kind_named
from xverse.checkpoint.gguf_pack import pack
from xverse.checkpoint.whole import require_space, whole_file
from xverse.errors import XverseError
from xverse.log import progress

ALIGNMENT = 32  # what readers assume where a file does not say
ELEMENTS_AT_ONCE = 2**20  # packed through fp32 in pieces of 4 MB, which stay in the cache
# Beyond these f16 has no number; scales are f16, and at least 8 times smaller than the largest.
LARGEST = {"F16": 65520.0, "F32": math.inf, "BF16": math.inf}
LARGEST_PACKED = 8 * 65504.0
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # the types of metadata values


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be: `shape` in PyTorch's order, rows first.

    `parts` give it, of any dtype, one behind the other along the first axis: whole where it is one,
    or of a stack matrix by matrix.
    """

    name: str
    shape: tuple[int, ...]
    kind: str  # "F16", "Q4_0", ...
    parts: Sequence[Callable[[], Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, short of what fills them up to the alignment."""
        kind = kind_named(self.kind)
        return math.prod(self.shape) // kind.elements * kind.nbytes


def write_gguf(path: Path, metadata: Mapping[str, object], tensors: Sequence[Outgoing]) -> None:
    """Write `path` whole or not at all; one part of a tensor is in memory at a time.

    Metadata values are str, bool, int (0..2^32-1), float, or a list of one of these (ints signed).
    Raises XverseError where the file is there already, the disk is too small, or a tensor holds
    numbers that its kind can't.
    """
    header = _header(metadata, tensors)
    with whole_file(path) as aside:
        require_space(aside.parent, len(header) + sum(_padded(one.nbytes) for one in tensors))
        with aside.open("wb") as file:
            file.write(header)
            for tensor in progress(tensors, total=len(tensors), label="writing"):
                for part in _packed(tensor):
                    file.write(part)
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())


def _packed(tensor: Outgoing) -> Iterator[memoryview]:
    """The tensor's blocks, in pieces."""
    kind, elements = kind_named(tensor.kind), 0
    for read in tensor.parts:
        values = read()
        elements += values.numel()
        for piece in values.reshape(-1).split(ELEMENTS_AT_ONCE):
            numbers = piece.float()
            _require_range(tensor, numbers)
            yield pack(tensor.kind, numbers.view(-1, kind.elements)).numpy().data
    assert elements == math.prod(tensor.shape), f"{tensor.name}: {elements} elements"


def _require_range(tensor: Outgoing, numbers: Tensor) -> None:
    """Raise XverseError where the tensor's kind has no such numbers."""
    if not bool((numbers.abs() < LARGEST.get(tensor.kind, LARGEST_PACKED)).all()):
        raise XverseError(
            f"{tensor.name} can't be written as {tensor.kind}.",
            f"It holds {float(numbers.abs().max()):.3g}, and {tensor.kind} has no such number.",
            "Choose --type bf16; a number that is not finite means a damaged checkpoint.",
        )


def _header(metadata: Mapping[str, object], tensors: Sequence[Outgoing]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [part for key, value in metadata.items() for part in (_string(key), _typed(value))]
    offset = 0
    for tensor in tensors:
        dims = tuple(reversed(tensor.shape))
        number = next(number for number, kind in KINDS.items() if kind.name == tensor.kind)
        parts += [_string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", number, offset))
        offset += _padded(tensor.nbytes)
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def _typed(value: object) -> bytes:
    """A metadata value behind the number of its type."""
    match value:
        case bool():
            return struct.pack("<IB", BOOL, value)
        case int():
            return struct.pack("<II", U32, value)
        case float():
            return struct.pack("<If", F32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case [str(), *_]:
            return _array(STRING, len(value)) + b"".join(_string(str(text)) for text in value)
        case [int(), *_]:
            return _array(I32, len(value)) + struct.pack(f"<{len(value)}i", *value)
        case [float(), *_]:
            return _array(F32, len(value)) + struct.pack(f"<{len(value)}f", *value)
    raise AssertionError(f"GGUF has no type for {value!r:.60}")


def _array(kind: int, length: int) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, length)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
