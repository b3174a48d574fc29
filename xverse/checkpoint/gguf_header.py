"""GGUF BYTES -> FACTS. The header of a GGUF file: its metadata, and where each tensor lies.

Nothing that a file says is believed before it is checked against the file's own length: counts,
lengths and offsets are Python integers, which cannot overflow, and memory is never asked for by a
count that the bytes behind it could not hold. Format: ggml's `docs/gguf.md`, versions 2 and 3.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from xverse.checkpoint.gguf_blocks import KINDS, OTHER_KINDS
from xverse.errors import XverseError

MAX_HEADER_BYTES = 256 * 2**20  # a vocabulary of 256K tokens needs about 20 MB
MAX_STRING_BYTES = 64 * 2**20
MAX_COUNT = 100_000  # of tensors, and of metadata entries
MAX_ARRAY_ELEMENTS = 2**22  # in all arrays together; the largest vocabularies have 1.5 million
MAX_ARRAY_DEPTH = 4

NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
BOOL, STRING, ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in its file; `shape` is in PyTorch's order, rows first."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "F32", "Q4_1", ...
    offset: int  # from the start of the file
    nbytes: int


def read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    """Metadata and tensors by name; XverseError where `data` is damaged or of another format."""
    return _Header(path, data).read()


def unreadable(path: Path, why: str) -> XverseError:
    """The error for a file that cannot be what it should be, and `why`."""
    return XverseError(
        f"{path.name} cannot be read as a GGUF model.",
        why[:1].upper() + why[1:] + ".",
        "Download it again and compare its size and checksum, or use another file.",
    )


class _Header:
    """Reads the part before the tensors, value by value, and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.elements = 0  # in arrays so far

    def read(self) -> tuple[dict[str, object], dict[str, GgufTensor]]:
        tensor_count, metadata_count = self.counts()
        metadata: dict[str, object] = {}
        for _ in range(metadata_count):
            key = self.string()
            if not key or key in metadata:
                raise self.bad(f"the metadata key {key!r:.80} is empty or comes twice")
            metadata[key] = self.value(self.number(4))
        places = [self.tensor() for _ in range(tensor_count)]
        return metadata, self.place(places, metadata.get("general.alignment", 32))

    def counts(self) -> tuple[int, int]:
        """Numbers of tensors and of metadata entries, after the magic and the version."""
        magic = bytes(self.data[self.take(4, "the magic") : self.at])
        if magic != b"GGUF":
            raise self.bad(f"it begins with {magic!r} instead of b'GGUF'")
        version = self.number(4)
        if version & 0xFFFF == 0:
            raise self.bad("it is big-endian, and only little-endian files are read")
        if version not in (2, 3):
            raise self.bad(f"its GGUF version is {version}, and versions 2 and 3 are read")
        tensors, metadata = self.number(10), self.number(10)
        if max(tensors, metadata) > MAX_COUNT:
            raise self.bad(f"{tensors} tensors and {metadata} metadata entries are too many")
        return tensors, metadata

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes`; gives the offset where they began."""
        start = self.at
        if nbytes > self.end - start:
            raise self.bad(f"{what} at byte {start} reaches past the end of the header")
        self.at = start + nbytes
        return start

    def number(self, kind: int) -> int:
        """One unsigned integer: kind 4 has 32 bits, kind 10 has 64."""
        layout = NUMBERS[kind]
        value: int = layout.unpack_from(self.data, self.take(layout.size, "a number"))[0]
        return value

    def string(self) -> str:
        nbytes = self.number(10)
        if nbytes > MAX_STRING_BYTES:
            raise self.bad(f"a string of {nbytes} bytes is too long")
        start = self.take(nbytes, "a string")
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"the string at byte {start} is not UTF-8 ({error.reason})") from error

    def value(self, kind: int, depth: int = 0) -> object:
        if kind in NUMBERS:
            layout = NUMBERS[kind]
            return layout.unpack_from(self.data, self.take(layout.size, "a number"))[0]
        if kind == BOOL:
            byte = self.data[self.take(1, "a bool")]
            if byte > 1:
                raise self.bad(f"a bool at byte {self.at - 1} is {byte}")
            return byte == 1
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(depth + 1)
        raise self.bad(f"a metadata value is of the unknown type {kind}")

    def array(self, depth: int) -> list[object]:
        kind, count = self.number(4), self.number(10)
        self.elements += count
        if depth > MAX_ARRAY_DEPTH or self.elements > MAX_ARRAY_ELEMENTS:
            raise self.bad(f"an array of {count} elements, {depth} deep, is too much")
        if kind in NUMBERS:
            layout = struct.Struct(f"<{count}{NUMBERS[kind].format[1:]}")
            return list(layout.unpack_from(self.data, self.take(layout.size, "an array")))
        return [self.value(kind, depth) for _ in range(count)]

    def tensor(self) -> GgufTensor:
        """One tensor's entry; its offset counts from where the data begins, as in the file."""
        name = self.string()
        dims = self.number(4)
        if not 1 <= dims <= 4:
            raise self.bad(f"tensor {name!r:.80} has {dims} dimensions")
        shape = tuple(reversed([self.number(10) for _ in range(dims)]))
        number, offset = self.number(4), self.number(10)
        kind = KINDS.get(number)
        if kind is None:
            label = OTHER_KINDS.get(number, f"number {number}")
            known = ", ".join(known.name for known in KINDS.values())
            raise self.bad(f"tensor {name!r:.80} is of kind {label}; read are {known}")
        if 0 in shape or shape[-1] % kind.elements:
            raise self.bad(f"tensor {name!r:.80} of shape {shape} is no whole {kind.name} blocks")
        nbytes = math.prod(shape) // kind.elements * kind.nbytes
        return GgufTensor(name, shape, kind.name, offset, nbytes)

    def place(self, entries: list[GgufTensor], alignment: object) -> dict[str, GgufTensor]:
        """The tensors by name, offsets counted from the file's start, each within it and alone."""
        if type(alignment) is not int or alignment not in (8 << shift for shift in range(14)):
            raise self.bad(f"an alignment of {alignment!r:.80} is not possible")
        begin = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        free = begin
        for entry in sorted(entries, key=lambda entry: entry.offset):
            offset = begin + entry.offset
            if entry.name in tensors:
                raise self.bad(f"the tensor {entry.name!r:.80} comes twice")
            if entry.offset % alignment or offset < free:
                raise self.bad(f"tensor {entry.name!r:.80} overlaps another or is out of line")
            free = offset + entry.nbytes
            if free > len(self.data):
                raise self.bad(
                    f"tensor {entry.name!r:.80} ends at byte {free}, and the file at"
                    f" {len(self.data)}: the download was cut short"
                )
            tensors[entry.name] = GgufTensor(
                entry.name, entry.shape, entry.kind, offset, entry.nbytes
            )
        return tensors

    def bad(self, why: str) -> XverseError:
        return unreadable(self.path, why)
