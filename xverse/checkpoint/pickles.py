"""PICKLE -> DESCRIPTORS. The pickle inside a PyTorch checkpoint, read as data and never run.

A pickle is a program for a small stack machine. This is our own such machine, with the opcodes that
a state dict needs and no others. A name in the stream (`torch.FloatStorage`) is looked up in a
closed table and stays a word: nothing is imported, called or built on the stream's behalf.
Opcodes are those of PEP 307, PEP 3154 and CPython's `Lib/pickletools.py`.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xverse.checkpoint.archive import Malformed

MAX_OPCODES = 4_000_000  # about 25 a tensor: 9,600 tensors, the largest XVERSE, take 250,000
MAX_STACK = 100_000
MAX_ELEMENTS = 2**48
MAX_RANK = 16
MAX_TEXT_BYTES = 65_536

STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
# The dtypes that have no storage class of their own and travel beside an UntypedStorage.
DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}


@dataclass(frozen=True)
class Storage:
    """A run of bytes beside the pickle, in the archive's member `data/<key>`."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its storage; offset and stride count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's own elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Name:
    """A `module.name` of the closed table; it stands for itself."""

    text: str


def read_pickle(data: bytes) -> object:
    """What the pickle `data` describes: dicts, lists, tuples, plain values and StoredTensors.

    Raises Malformed where the stream names anything outside the closed table, uses an opcode that
    a state dict does not need, contradicts itself, or is longer or deeper than a checkpoint can be.
    """
    machine = _Machine(data)
    for _ in range(MAX_OPCODES):
        opcode = machine.take(1)[0]
        if opcode == STOP:
            return machine.finish()
        run = _OPCODES.get(opcode)
        if run is None:
            raise Malformed(
                f"the opcode {_REFUSED.get(opcode, hex(opcode))} at byte {machine.at - 1} is not "
                "allowed: no weights need it"
            )
        run(machine)
    raise Malformed(f"the pickle runs for more than {MAX_OPCODES} steps")


class _Machine:
    """The stack, the marks and the memo of one pickle being read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the stream."""
        if count > len(self.data) - self.at:
            raise Malformed(
                f"the pickle ends at byte {len(self.data)}, and goes on to {self.at + count}"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def take_int(self, count: int) -> int:
        """The next `count` bytes as an unsigned little-endian number."""
        return int.from_bytes(self.take(count), "little")

    def take_text(self, count: int) -> str:
        """The next `count` bytes as UTF-8."""
        if count > MAX_TEXT_BYTES:
            raise Malformed(f"a string of {count} bytes is longer than any tensor's name")
        return _decode(self.take(count))

    def take_line(self) -> str:
        """The text up to the next newline."""
        end = self.data.find(b"\n", self.at, self.at + MAX_TEXT_BYTES)
        if end < 0:
            raise Malformed("a name in the pickle has no end")
        return _decode(self.take(end - self.at + 1)[:-1])

    def push(self, value: object) -> None:
        """Put `value` on the stack."""
        if len(self.stack) >= MAX_STACK:
            raise Malformed(f"the stack grows beyond {MAX_STACK} values")
        self.stack.append(value)

    def pop(self, count: int = 1) -> list[object]:
        """The last `count` values, oldest first; never reaches below the newest mark."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise Malformed(f"the stack is short of a value at byte {self.at}")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list[object]:
        """The values since the newest mark, which is dropped."""
        if not self.marks:
            raise Malformed(f"a mark is missing at byte {self.at}")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def mark(self) -> None:
        """Remember the stack's height."""
        if len(self.marks) >= MAX_STACK:
            raise Malformed(f"more than {MAX_STACK} marks are open")
        self.marks.append(len(self.stack))

    def top(self) -> object:
        """The last value, which stays."""
        (value,) = self.pop()
        self.stack.append(value)
        return value

    def remember(self, index: int) -> None:
        """Keep the last value under `index`."""
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        """Push what was kept under `index`."""
        if index not in self.memo:
            raise Malformed(f"value {index} is recalled at byte {self.at} and was never kept")
        self.push(self.memo[index])

    def finish(self) -> object:
        """The one value left at the end."""
        if len(self.stack) != 1 or self.marks or self.at != len(self.data):
            raise Malformed(f"the pickle stops at byte {self.at} of {len(self.data)}, half done")
        return self.stack[0]


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"the text {raw[:80]!r} is not UTF-8") from None


def _word(value: object) -> str:
    """`value` for a message; of a container only its kind, since printing one may never end."""
    if isinstance(value, Name):
        return value.text
    return repr(value)[:120] if isinstance(value, str | int | float) else type(value).__name__


def _protocol(machine: _Machine) -> None:
    version = machine.take_int(1)
    if not 2 <= version <= 5:
        raise Malformed(f"pickle protocol {version} is not one that PyTorch writes")


def _frame(machine: _Machine) -> None:
    length = machine.take_int(8)
    if length > len(machine.data) - machine.at:
        raise Malformed(f"the pickle ends at byte {len(machine.data)}, inside a frame of {length}")


def _long1(machine: _Machine) -> None:
    machine.push(int.from_bytes(machine.take(machine.take_int(1)), "little", signed=True))


def _append(machine: _Machine, values: list[object]) -> None:
    target = machine.top()
    if not isinstance(target, list):
        raise Malformed(f"values are appended to {type(target).__name__} at byte {machine.at}")
    target.extend(values)


def _set_items(machine: _Machine, values: list[object]) -> None:
    target = machine.top()
    if not isinstance(target, dict):
        raise Malformed(f"items are set in {type(target).__name__} at byte {machine.at}")
    if len(values) % 2:
        raise Malformed(f"a key without a value at byte {machine.at}")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if not isinstance(key, str | int):
            raise Malformed(f"a key is {_word(key)}, not a name")
        if key in target:
            raise Malformed(f"the key {_word(key)} occurs more than once")
        target[key] = value


def _name(machine: _Machine, module: object, name: object) -> None:
    text = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
    if text not in _ALLOWED:
        raise Malformed(
            f"it names {_word(text)}, which is not allowed: weights need no code, and none was run"
        )
    machine.push(Name(text))


def _persistent_id(machine: _Machine) -> None:
    (identity,) = machine.pop()
    match identity:
        case ("storage", Name(text), str(key), str(), int(count)) if text in STORAGE_DTYPES:
            dtype = STORAGE_DTYPES[text]
            machine.push(Storage(key, dtype, _count(count, "storage") * dtype.itemsize))
        case _:
            raise Malformed(f"the storage described at byte {machine.at} is malformed")


def _reduce(machine: _Machine) -> None:
    function, arguments = machine.pop(2)
    rebuild = _REBUILD.get(function.text) if isinstance(function, Name) else None
    if rebuild is None or not isinstance(arguments, tuple):
        raise Malformed(f"a call of {_word(function)} at byte {machine.at} is not allowed")
    machine.push(rebuild(arguments))


def _build(machine: _Machine) -> None:
    """OrderedDict's attributes (`_metadata` of a state dict) are dropped; nothing else has any."""
    target, state = machine.pop(2)
    if type(target) is not dict or type(state) is not dict or set(state) - {"_metadata"}:
        raise Malformed(f"attributes are set at byte {machine.at}; weights have none")
    machine.push(target)


def _rebuild_dict(arguments: tuple[object, ...]) -> object:
    if arguments:
        raise Malformed("an OrderedDict is made from arguments; torch.save makes it empty")
    return {}


def _rebuild_tensor_v2(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (Storage() as storage, offset, shape, stride, bool(), {}, *rest) if rest in _PLAIN:
            return _tensor(storage, storage.dtype, offset, shape, stride)
    raise Malformed("a tensor is described with other arguments than torch.save's")


def _rebuild_tensor_v3(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (Storage() as storage, offset, shape, stride, bool(), {}, Name(dtype), *rest) if (
            rest in _PLAIN and dtype in DTYPES
        ):
            return _tensor(storage, DTYPES[dtype], offset, shape, stride)
    raise Malformed("a tensor is described with other arguments than torch.save's")


def _rebuild_parameter(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (StoredTensor() as tensor, bool(), {}):
            return tensor
    raise Malformed("a Parameter is described with other arguments than torch.save's")


def _tensor(
    storage: Storage, dtype: torch.dtype, offset: object, shape: object, stride: object
) -> StoredTensor:
    """The tensor described, every element of it inside its storage."""
    if not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise Malformed("a tensor's shape is not a tuple")
    if len(shape) != len(stride) or len(shape) > MAX_RANK:
        raise Malformed(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    sizes = tuple(_count(size, "size") for size in shape)
    steps = tuple(_count(step, "stride") for step in stride)
    first = _count(offset, "offset")
    if math.prod(max(size, 1) for size in sizes) > MAX_ELEMENTS:
        raise Malformed(f"a tensor of shape {sizes} is larger than any model")
    tensor = StoredTensor(storage, dtype, first, sizes, steps)
    last = first + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # The second condition stops a small storage that is seen many times over (a stride of 0).
    if tensor.nbytes and max((last + 1) * dtype.itemsize, tensor.nbytes) > storage.nbytes:
        raise Malformed(
            f"a tensor of shape {sizes}, stride {steps} and offset {first} does not fit its "
            f"storage of {storage.nbytes} bytes"
        )
    return tensor


def _count(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_ELEMENTS:
        raise Malformed(f"a tensor's {what} is {_word(value)}")
    return value


_PLAIN: list[list[object]] = [[], [None], [{}]]  # no metadata: neither conjugate nor negative views

_REBUILD: dict[str, Callable[[tuple[object, ...]], object]] = {
    "collections.OrderedDict": _rebuild_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
_ALLOWED = _REBUILD.keys() | STORAGE_DTYPES.keys() | DTYPES.keys()

STOP = ord(".")
_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    # values
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.take_int(1)),
    ord("M"): lambda m: m.push(m.take_int(2)),
    ord("J"): lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    0x8A: _long1,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    0x8C: lambda m: m.push(m.take_text(m.take_int(1))),
    ord("X"): lambda m: m.push(m.take_text(m.take_int(4))),
    0x8D: lambda m: m.push(m.take_text(m.take_int(8))),
    # tuples, lists, dicts
    ord("("): _Machine.mark,
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.push(tuple(m.pop(1))),
    0x86: lambda m: m.push(tuple(m.pop(2))),
    0x87: lambda m: m.push(tuple(m.pop(3))),
    ord("t"): lambda m: m.push(tuple(m.pop_to_mark())),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: _append(m, m.pop()),
    ord("e"): lambda m: _append(m, m.pop_to_mark()),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: _set_items(m, m.pop(2)),
    ord("u"): lambda m: _set_items(m, m.pop_to_mark()),
    # memo
    ord("q"): lambda m: m.remember(m.take_int(1)),
    ord("r"): lambda m: m.remember(m.take_int(4)),
    0x94: lambda m: m.remember(len(m.memo)),
    ord("h"): lambda m: m.recall(m.take_int(1)),
    ord("j"): lambda m: m.recall(m.take_int(4)),
    # names, and what may be done with them
    ord("c"): lambda m: _name(m, m.take_line(), m.take_line()),
    0x93: lambda m: _name(m, *m.pop(2)),
    ord("Q"): _persistent_id,
    ord("R"): _reduce,
    ord("b"): _build,
}
# The opcodes we lack that can run code, to call them by name in the message.
_REFUSED = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
}
