"""ZIP -> BYTE RANGES. Where each member of a PyTorch checkpoint lies, so it can be mapped in place.

Only what `torch.save` writes: stored members, one disk, zip64. Nothing is extracted, so no name in
an archive ever becomes a path. The layout is PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_MEMBERS = 200_000
MAX_DIRECTORY_BYTES = 64 * 2**20

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1
_STORED = 0
_IN_ZIP64 = 0xFFFFFFFF


class Malformed(Exception):
    """Why a checkpoint is refused; whoever opened the file adds its name."""


@dataclass(frozen=True)
class Member:
    """A run of bytes in the file: the member as it was stored, uncompressed."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Entry:
    name: str
    header: int
    nbytes: int


def read_members(path: Path) -> dict[str, Member]:
    """Every member of the archive `path` by name.

    Raises Malformed where the file is cut short, compressed, encrypted, or says what cannot be:
    ranges outside the file or over each other, a name twice, a name that leads out of a folder.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start, length, count = _find_directory(file, size)
        entries = _read_directory(_read(file, start, length), count)
        members: dict[str, Member] = {}
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header):
            if entry.header < end:
                raise Malformed(f"the member {entry.name!r} lies over another one")
            member = _locate(file, entry, start)
            end = member.offset + member.nbytes
            if entry.name in members:
                raise Malformed(f"the member {entry.name!r} occurs more than once")
            members[entry.name] = member
    return members


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    data = file.read(length)
    if len(data) < length:
        raise Malformed(f"{length} bytes at {offset} are needed; the file ends at {file.tell()}")
    return data


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Start, length and number of entries of the directory, which stands at the file's end."""
    end = _find_end(file, size)
    _, disk, start_disk, _, count, length, start, _ = _END.unpack(_read(file, end, _END.size))
    if disk or start_disk:
        raise Malformed("the archive is split over several disks")
    at = end - _END64_LOCATOR.size
    if at >= 0 and (locator := _read(file, at, _END64_LOCATOR.size)).startswith(b"PK\6\7"):
        _, _, end, _ = _END64_LOCATOR.unpack(locator)
        if end + _END64.size > at:
            raise Malformed(f"the zip64 record at {end} lies outside the file of {size} bytes")
        signature, *_, count, length, start = _END64.unpack(_read(file, end, _END64.size))
        if signature != b"PK\6\6":
            raise Malformed(f"there is no zip64 record at {end}")
    if start + length != end:
        raise Malformed(
            f"its directory should end at byte {start + length} and ends at byte {end}: "
            f"the file of {size} bytes has lost or gained some"
        )
    if length > MAX_DIRECTORY_BYTES or count > MAX_MEMBERS:
        raise Malformed(f"its directory lists {count} members in {length} bytes, far too many")
    return start, length, count


def _find_end(file: BinaryIO, size: int) -> int:
    """Offset of the end record; it is followed by a comment of at most 65,535 bytes."""
    tail_bytes = min(size, _END.size + 0xFFFF)
    tail = _read(file, size - tail_bytes, tail_bytes)
    at = len(tail)
    while (at := tail.rfind(b"PK\5\6", 0, at)) >= 0:
        if len(tail) - at >= _END.size:
            comment_bytes = _END.unpack_from(tail, at)[-1]
            if at + _END.size + comment_bytes == len(tail):
                return size - len(tail) + at
    raise Malformed(
        f"the directory that a complete file has at its end is not there: "
        f"the download stopped early, after {size} bytes"
    )


def _read_directory(data: bytes, count: int) -> list[_Entry]:
    entries: list[_Entry] = []
    at = 0
    while len(entries) < count:
        if at + _ENTRY.size > len(data):
            raise Malformed(f"its directory promises {count} members and holds {len(entries)}")
        record = _ENTRY.unpack_from(data, at)
        signature, _, _, flags, method, _, _, _, packed, nbytes, *rest = record
        name_bytes, extra_bytes, comment_bytes, _, _, _, header = rest
        at += _ENTRY.size
        name = _decode_name(data[at : at + name_bytes])
        extra = data[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\1\2" or at > len(data):
            raise Malformed("its directory is damaged")
        nbytes, packed, header = _widen(extra, nbytes, packed, header)
        if flags & _ENCRYPTED or method != _STORED or packed != nbytes:
            raise Malformed(f"the member {name!r} is compressed or encrypted; torch.save stores")
        entries.append(_Entry(name, header, nbytes))
    if at != len(data):
        raise Malformed(f"its directory has {len(data) - at} bytes too many")
    return entries


def _decode_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"the member name {raw[:80]!r} is not UTF-8") from None
    parts = name.split("/")
    if ".." in parts or "" in parts or "\\" in name or "\0" in name:
        raise Malformed(f"the member name {name[:80]!r} leads out of its folder")
    return name


def _widen(extra: bytes, *narrow: int) -> list[int]:
    """The 32-bit fields `narrow`, with those too small to hold their value read from zip64."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    values = list(narrow)
    for i, value in enumerate(values):
        if value == _IN_ZIP64:
            if len(wide) < 8:
                raise Malformed("a zip64 field is missing")
            values[i] = int.from_bytes(wide[:8], "little")
            wide = wide[8:]
    return values


def _locate(file: BinaryIO, entry: _Entry, limit: int) -> Member:
    """The bytes of `entry`; its local header must agree with the directory, and end by `limit`."""
    if entry.header + _LOCAL.size > limit:
        raise Malformed(f"the member {entry.name!r} lies outside the file")
    record = _LOCAL.unpack(_read(file, entry.header, _LOCAL.size))
    signature, _, flags, method, *_, name_bytes, extra_bytes = record
    name = entry.name.encode()
    agrees = signature == b"PK\3\4" and name_bytes == len(name) and method == _STORED
    if not agrees or flags & _ENCRYPTED or file.read(name_bytes) != name:
        raise Malformed(f"the header of the member {entry.name!r} contradicts the directory")
    offset = entry.header + _LOCAL.size + name_bytes + extra_bytes
    if offset + entry.nbytes > limit:
        raise Malformed(
            f"the member {entry.name!r} needs the file's bytes up to {offset + entry.nbytes}, "
            f"and only {limit} come before the directory"
        )
    return Member(offset, entry.nbytes)
