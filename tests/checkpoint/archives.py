"""FIXTURE. PyTorch checkpoints written byte by byte, so that a test can make any of them wrong."""

import struct
from pathlib import Path

CUT = 0xFFFFFFFF


def write_zip(path: Path, members: dict[str, bytes | int], *, zip64: bool = False) -> None:
    """A stored zip; a member given as a number is a hole of that many zero bytes."""
    directory = b""
    with path.open("wb") as file:
        for name, content in members.items():
            header, raw = file.tell(), name.encode()
            nbytes = content if isinstance(content, int) else len(content)
            file.write(local_header(raw, 0 if zip64 else nbytes))
            if isinstance(content, int):
                file.seek(content, 1)
            else:
                file.write(content)
            directory += entry(raw, nbytes, header, zip64=zip64)
        start = file.tell()
        file.write(directory)
        file.write(end_records(start, len(directory), len(members), zip64=zip64))


def local_header(name: bytes, nbytes: int) -> bytes:
    """What stands before a member."""
    fields = (b"PK\3\4", 0, 0x800, 0, 0, 0, 0, nbytes, nbytes, len(name), 0)
    return struct.pack("<4s5H3L2H", *fields) + name


def entry(name: bytes, nbytes: int, header: int, *, zip64: bool = False, method: int = 0) -> bytes:
    """What the directory says of a member."""
    extra = struct.pack("<2H3Q", 1, 24, nbytes, nbytes, header) if zip64 else b""
    sizes = (CUT, CUT) if zip64 else (nbytes, nbytes)
    at = CUT if zip64 else header
    fields = (b"PK\1\2", 0, 0, 0x800, method, 0, 0, 0, *sizes, len(name), len(extra), 0, 0, 0, 0)
    return struct.pack("<4s6H3L5H2L", *fields, at) + name + extra


def end_records(start: int, length: int, count: int, *, zip64: bool = False) -> bytes:
    """What stands after the directory."""
    if not zip64:
        return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, start, 0)
    wide = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, length, start
    ) + struct.pack("<4sLQL", b"PK\6\7", 0, start + length, 1)
    return wide + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, CUT, CUT, 0)


def write_checkpoint(path: Path, pickled: bytes, storages: dict[str, bytes | int]) -> None:
    """A `torch.save` archive around any pickle."""
    members: dict[str, bytes | int] = {"archive/data.pkl": pickled}
    members |= {f"archive/data/{key}": content for key, content in storages.items()}
    write_zip(path, members)


def text(value: str) -> bytes:
    """Push a string."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Push an int."""
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + raw


def name(module: str, attribute: str) -> bytes:
    """Push a global."""
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*values: bytes) -> bytes:
    """Push a tuple."""
    return b"(" + b"".join(values) + b"t"


def storage(
    key: bytes = text("0"), count: bytes = number(6), kind: bytes = name("torch", "FloatStorage")
) -> bytes:
    """Push a storage, of 6 floats unless told otherwise."""
    return tuple_of(text("storage"), kind, key, text("cpu"), count) + b"Q"


def tensor(
    stored: bytes = storage(),
    offset: bytes = number(0),
    shape: bytes = tuple_of(number(2), number(3)),
    stride: bytes = tuple_of(number(3), number(1)),
    *rest: bytes,
) -> bytes:
    """Push a tensor, of shape [2, 3] on 6 floats unless told otherwise."""
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = tuple_of(stored, offset, shape, stride, *(rest or (b"\x89", hooks)))
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def state_dict(**entries: bytes) -> bytes:
    """A whole pickle: a dict of `entries`."""
    body = b"".join(text(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + body + b"u."


def program(body: bytes) -> bytes:
    """A whole pickle that leaves what `body` leaves."""
    return b"\x80\x02" + body + b"."
