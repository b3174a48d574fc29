"""The zip around a checkpoint: only what torch.save writes, every member inside the file."""

import struct
import zipfile
from pathlib import Path

import pytest

from tests.checkpoint.archives import end_records, entry, local_header, write_zip
from xverse.checkpoint import archive
from xverse.checkpoint.archive import Malformed, read_members


def read(path: Path, name: str) -> bytes:
    member = read_members(path)[name]
    return path.read_bytes()[member.offset : member.offset + member.nbytes]


@pytest.mark.parametrize("zip64", [False, True])
def test_members_are_found_where_they_lie(tmp_path: Path, zip64: bool) -> None:
    write_zip(
        tmp_path / "a", {"模/data.pkl": b"pickle", "模/data/0": b"", "模/x": b"1"}, zip64=zip64
    )
    assert read(tmp_path / "a", "模/data.pkl") == b"pickle"
    assert read(tmp_path / "a", "模/data/0") == b""
    assert read(tmp_path / "a", "模/x") == b"1"


def test_archives_of_other_writers_are_read(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "a", "w") as made,
        made.open("r/x", "w", force_zip64=True) as to,
    ):
        to.write(b"content")
    with zipfile.ZipFile(tmp_path / "a", "a") as made:
        made.comment = b"PK\5\6 a comment that looks like an end record"
    assert read(tmp_path / "a", "r/x") == b"content"


def test_members_beyond_4_gib_are_found(tmp_path: Path) -> None:
    hole = 5 * 2**30  # sparse: it takes no room on the disk
    write_zip(tmp_path / "a", {"r/big": hole, "r/last": b"end"}, zip64=True)
    members = read_members(tmp_path / "a")
    assert members["r/big"].nbytes == hole
    with (tmp_path / "a").open("rb") as file:
        file.seek(members["r/last"].offset)
        assert file.read(members["r/last"].nbytes) == b"end"


def refused(path: Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(Malformed, match=match):
        read_members(path)


def archive_of(*entries: bytes, body: bytes = local_header(b"r/x", 4) + b"data") -> bytes:
    directory = b"".join(entries)
    return body + directory + end_records(len(body), len(directory), len(entries))


GOOD = archive_of(entry(b"r/x", 4, 0))


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for end in range(len(GOOD)):
        refused(tmp_path / "a", GOOD[:end], "directory|needed")
    refused(tmp_path / "a", GOOD[:-1], f"stopped early, after {len(GOOD) - 1} bytes")
    refused(tmp_path / "a", GOOD[1:], "should end at byte 86 and ends at byte 85")
    refused(tmp_path / "a", GOOD + b"more", "not there")


def test_a_cut_in_the_middle_names_both_sizes(tmp_path: Path) -> None:
    write_zip(tmp_path / "a", {"r/x": b"a" * 1000, "r/y": b"b" * 1000})
    whole = (tmp_path / "a").read_bytes()
    refused(tmp_path / "a", whole[:500] + whole[600:], "has lost or gained some")


HOSTILE = {
    "compressed": (archive_of(entry(b"r/x", 4, 0, method=8)), "compressed"),
    "encrypted": (GOOD.replace(b"PK\1\2\0\0\0\0\0\x08", b"PK\1\2\0\0\0\0\1\x08"), "encrypted"),
    "compressed in the local header": (
        archive_of(
            entry(b"r/x", 4, 0),
            body=local_header(b"r/x", 4).replace(b"\0\x08\0\0", b"\0\x08\x08\0", 1) + b"data",
        ),
        "contradicts",
    ),
    "another name in the local header": (archive_of(entry(b"r/y", 4, 0)), "contradicts"),
    "zip slip": (archive_of(entry(b"r/../../x", 4, 0)), "leads out"),
    "absolute": (archive_of(entry(b"/etc/x", 4, 0)), "leads out"),
    "backslash": (archive_of(entry(b"r\\..\\x", 4, 0)), "leads out"),
    "null byte": (archive_of(entry(b"r/x\0.bin", 4, 0)), "leads out"),
    "no name": (archive_of(entry(b"", 4, 0)), "leads out"),
    "not UTF-8": (archive_of(entry(b"r/\xff", 4, 0)), "UTF-8"),
    "listed twice": (archive_of(entry(b"r/x", 4, 0), entry(b"r/x", 4, 0)), "over another"),
    "twice": (
        archive_of(
            entry(b"r/x", 4, 0), entry(b"r/x", 4, 37), body=(local_header(b"r/x", 4) + b"data") * 2
        ),
        "more than once",
    ),
    "one over the other": (
        archive_of(
            entry(b"r/x", 39, 0), entry(b"r/x", 4, 37), body=(local_header(b"r/x", 4) + b"data") * 2
        ),
        "over another",
    ),
    "size beyond the file": (archive_of(entry(b"r/x", 5, 0)), "needs the file's bytes up to 38"),
    "size of 4 GB": (archive_of(entry(b"r/x", 2**32 - 2, 0)), "needs the file's bytes"),
    "size of 2**64": (
        archive_of(entry(b"r/x", 2**64 - 1, 0, zip64=True)), "needs the file's bytes",
    ),
    "header beyond the file": (archive_of(entry(b"r/x", 4, 5000)), "outside the file"),
    "header of 2**64": (archive_of(entry(b"r/x", 4, 2**64 - 9, zip64=True)), "outside the file"),
    "header in the data": (archive_of(entry(b"r/x", 4, 3)), "contradicts"),
    "zip64 field missing": (archive_of(entry(b"r/x", 2**32 - 1, 0)), "zip64 field"),
    "directory with junk": (archive_of(entry(b"r/x", 4, 0) + b"junk"), "bytes too many"),
    "directory without signature": (GOOD.replace(b"PK\1\2", b"PK\1\3"), "damaged"),
    "more members promised": (
        GOOD[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 49, 37, 0), "promises 9",
    ),
    "directory elsewhere": (
        GOOD[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 49, 0, 0), "lost or gained",
    ),
    "second disk": (
        GOOD[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 1, 1, 1, 1, 49, 37, 0), "disks",
    ),
    "zip64 record outside": (
        GOOD[:-22] + struct.pack("<4sLQL", b"PK\6\7", 0, 2**63, 1) + GOOD[-22:], "zip64 record",
    ),
    "zip64 record of nothing": (
        b"\0" * 99 + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + GOOD[-22:], "no zip64 record",
    ),
    "no archive": (b"hello" * 100, "not there"),
    "empty": (b"", "not there"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "match"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archives_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    refused(tmp_path / "a", content, match)


def test_a_bomb_of_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    write_zip(tmp_path / "a", {f"r/{i}": b"" for i in range(4)})
    with pytest.raises(Malformed, match="far too many"):
        read_members(tmp_path / "a")


def test_no_mutation_escapes(tmp_path: Path) -> None:
    """Every byte set to 0, 127 and 255: members inside the file, or Malformed."""
    path = tmp_path / "a"
    for at in range(len(GOOD)):
        for value in (0, 127, 255):
            path.write_bytes(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])
            try:
                members = read_members(path)
            except Malformed:
                continue
            assert all(0 <= m.offset <= m.offset + m.nbytes <= 37 for m in members.values())
