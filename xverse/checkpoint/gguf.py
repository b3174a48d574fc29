"""GGUF -> TENSORS. A GGUF file: its metadata, and its tensors under the names that it has."""

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from xverse.checkpoint.gguf_blocks import kind_named
from xverse.checkpoint.gguf_header import GgufTensor, read_header, unreadable
from xverse.errors import XverseError

ELEMENTS_AT_ONCE = 2**20  # unpacked through fp32 in pieces of 4 MB, which stay in the cache

Scalar = TypeVar("Scalar", str, int, float, bool)


class GgufFile:
    """A GGUF file, mapped read-only: metadata and tensor places are read and checked on opening."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        metadata, tensors = read_header(path, data)
        self.metadata: Mapping[str, object] = MappingProxyType(metadata)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """The file at `path`; XverseError where it is absent, damaged or of another format."""
        path = Path(path)
        try:
            if not path.is_file():
                raise XverseError(
                    f"There is no file {path}.",
                    "Nothing is there, or it is a folder or a device.",
                    "Give the path of a .gguf file.",
                )
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: empty, or a path with a null byte
            raise unreadable(path, str(error)) from error
        return cls(path, data)

    def get(self, key: str, kind: type[Scalar]) -> Scalar | None:
        """The metadata value `key`, or None without one; XverseError for another type or a NaN."""
        value = self.metadata.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or (type(value) is kind and _finite(value)):
            return value
        raise unreadable(
            self.path, f"{key} is {value!r:.60}, and a finite {kind.__name__} is wanted"
        )

    def get_list(self, key: str, kind: type[Scalar]) -> list[Scalar] | None:
        """The metadata array `key` of one kind of scalar, or None without one."""
        values = self.metadata.get(key)
        if values is None:
            return None
        if isinstance(values, list) and all(type(one) is kind and _finite(one) for one in values):
            return values
        raise unreadable(self.path, f"{key} is not a list of finite {kind.__name__} values")

    def read(self, name: str, dtype: torch.dtype, at: int | None = None) -> Tensor:
        """The tensor `name`, unpacked in fp32 and cast to `dtype`, in memory of its own.

        With `at`, the matrix of that number in a stack of them.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise unreadable(self.path, f"it holds no tensor {name!r:.80}")
        shape, begin, nbytes = tensor.shape, tensor.offset, tensor.nbytes
        if at is not None:
            nbytes //= shape[0]  # rows are whole blocks, so matrices are too
            shape, begin = shape[1:], begin + at * nbytes
        kind = kind_named(tensor.kind)
        out = torch.empty(shape, dtype=dtype)
        flat, packed = out.view(-1), memoryview(self._data)
        step = ELEMENTS_AT_ONCE // kind.elements * kind.nbytes
        for done in range(0, nbytes, step):
            piece = packed[begin + done : begin + min(done + step, nbytes)]
            blocks = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
            values = kind.unpack(blocks.view(-1, kind.nbytes)).view(-1)
            first = done // kind.nbytes * kind.elements
            flat[first : first + len(values)] = values
        return out


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
