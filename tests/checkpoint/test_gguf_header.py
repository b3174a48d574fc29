import dataclasses
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny_gguf import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    Draft,
    Entry,
    llama,
    packed,
)
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_config import config_of
from xverse.checkpoint.gguf_tokenizer import tokenizer_of
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.errors import XverseError

HUGE = 2**64 - 1


def raw(key: str, value: bytes) -> bytes:
    """A file with one metadata entry, whose type and value are the bytes `value`."""
    return dataclasses.replace(Draft(), metadata=[(key, value)]).bytes()


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + elements


def nested(depth: int) -> bytes:
    inner = struct.pack("<IQ", U8, 0)
    for _ in range(depth):
        inner = struct.pack("<IQ", ARRAY, 1) + inner
    return struct.pack("<I", ARRAY) + inner


def tensor(**fields: object) -> bytes:
    """A file with one tensor of 4 x 8 F32, some of whose fields are other than they should be."""
    entry = Entry("w", (8, 4), 0, 0, b"\0" * 128)
    return Draft(entries=[dataclasses.replace(entry, **fields)]).bytes()  # type: ignore[arg-type]


def two(first: Entry, second: Entry) -> bytes:
    return Draft(entries=[first, second]).bytes()


def aligned(kind: int, value: object) -> bytes:
    draft = Draft(entries=[Entry("w", (8,), 0, 0, b"\0" * 32)])
    return draft.put("general.alignment", kind, value).bytes()


GOOD = llama().bytes()
FULL = Entry("w", (8,), 0, 0, b"\0" * 32)

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"G",
    "magic alone": b"GGUF",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "old magic": dataclasses.replace(Draft(), magic=b"ggml").bytes(),
    "zip": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x02cposix\nsystem\n(S'touch canary'\ntR.",
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "version 0": dataclasses.replace(Draft(), version=0).bytes(),
    "version 1": dataclasses.replace(Draft(), version=1).bytes(),
    "version 4": dataclasses.replace(Draft(), version=4).bytes(),
    "big-endian": dataclasses.replace(Draft(), version=3 << 24).bytes(),
    "ends after the version": Draft().bytes()[:8],
    "ends in the counts": Draft().bytes()[:20],
    "tensor count huge": dataclasses.replace(Draft(), tensor_count=HUGE).bytes(),
    "tensor count at the limit": dataclasses.replace(Draft(), tensor_count=100_000).bytes(),
    "metadata count huge": dataclasses.replace(Draft(), metadata_count=HUGE).bytes(),
    "metadata count at the limit": dataclasses.replace(Draft(), metadata_count=100_000).bytes(),
    "metadata count negative": dataclasses.replace(Draft(), metadata_count=2**63).bytes(),
    "one entry more than there is": dataclasses.replace(
        llama(), tensor_count=len(llama().entries) + 1
    ).bytes(),
    "key of huge length": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE),
    "key of 65 MB": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 65 * 2**20) + bytes(100),
    "key beyond the end": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 200) + bytes(100),
    "key empty": raw("", struct.pack("<IB", U8, 1)),
    "key not UTF-8": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xfe" + bytes(16),
    "key twice": dataclasses.replace(
        Draft(), metadata=[("a", struct.pack("<IB", U8, 1))] * 2
    ).bytes(),
    "value type unknown": raw("a", struct.pack("<IB", 13, 1)),
    "value type huge": raw("a", struct.pack("<IB", 2**32 - 1, 1)),
    "value cut off": raw("a", struct.pack("<IH", 10, 1))[:39],
    "bool of 2": raw("a", struct.pack("<IB", BOOL, 2)),
    "string beyond the end": raw("a", struct.pack("<IQ", STRING, 1000)),
    "string not UTF-8": raw("a", struct.pack("<I", STRING) + packed(STRING, b"\xc3\x28")),
    "string with half a surrogate": raw(
        "a", struct.pack("<I", STRING) + packed(STRING, b"\xed\xa0\x80")
    ),
    "array of huge count": raw("a", array(U32, HUGE)),
    "array of 2**62 doubles, which would overflow": raw("a", array(12, 2**62)),
    "array of 2**61 empty strings": raw("a", array(STRING, 2**61)),
    "array of a million strings in no bytes": raw("a", array(STRING, 10**6)),
    "array of four million bytes in no bytes": raw("a", array(U8, 4 * 10**6)),
    "array of unknown kind": raw("a", array(99, 1, bytes(64))),
    "array of bad bools": raw("a", array(BOOL, 3, b"\1\0\7")),
    "arrays 5 deep": raw("a", nested(5)),
    "arrays 10,000 deep": raw("a", nested(10_000)),
    "array of arrays without end": raw("a", array(ARRAY, 2**21)),
    "arrays too long together": Draft(
        metadata=[(key, array(U8, 3 * 10**6, bytes(3 * 10**6))) for key in "ab"]
    ).bytes(),
    "tensor name beyond the end": llama().bytes()[:1200],
    "tensor without dimensions": tensor(dims=()),
    "tensor of 5 dimensions": tensor(dims=(2, 2, 2, 2, 2)),
    "tensor of 2**32-1 dimensions": tensor(dims=(8,)).replace(
        struct.pack("<IQ", 1, 8), struct.pack("<IQ", 2**32 - 1, 8)
    ),
    "dimension zero": tensor(dims=(8, 0)),
    "dimension huge": tensor(dims=(HUGE, 4)),
    "dimensions whose product overflows to 0": tensor(dims=(2**32, 2**32)),
    "dimensions whose product overflows to 32": tensor(dims=(2**59 + 1, 32)),
    "dimensions whose bytes overflow": tensor(dims=(2**62,)),
    "kind unknown": tensor(kind=5),
    "kind huge": tensor(kind=2**32 - 1),
    "kind not read": tensor(kind=10),
    "row not of whole blocks": tensor(dims=(8, 32), kind=2),
    "tensor larger than the file": tensor(dims=(8, 5)),
    "tensor much larger than the file": tensor(dims=(2**40, 2**20)),
    "offset beyond the end": tensor(offset=2**40, data=b""),
    "offset huge": tensor(offset=HUGE - 31, data=b""),
    "offset negative": tensor(offset=2**64 - 128, data=b""),
    "offset out of line": tensor(offset=4),
    "data cut off": GOOD[:-1],
    "no data at all": tensor(data=b""),
    "tensor twice": two(FULL, dataclasses.replace(FULL, offset=32)),
    "tensors at one place": two(FULL, dataclasses.replace(FULL, name="v")),
    "tensors that overlap": two(
        dataclasses.replace(FULL, dims=(9,)), dataclasses.replace(FULL, name="v", offset=32)
    ),
    "alignment 0": aligned(U32, 0),
    "alignment 3": aligned(U32, 3),
    "alignment 2**31": aligned(U32, 2**31),
    "alignment true": aligned(BOOL, 1),
    "alignment as text": aligned(STRING, "32"),
    "alignment as float": aligned(F32, 32.0),
    "alignment not a number": aligned(F32, float("nan")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_at_once_and_in_little_memory(tmp_path: Path, case: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(XverseError) as raised:
            GgufFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 1.0
    assert peak < 2**20 + 12 * len(HOSTILE[case])
    assert raised.value.why
    assert raised.value.fix


def test_there_are_fifty_of_them_and_the_file_they_are_made_from_is_right(tmp_path: Path) -> None:
    assert len(HOSTILE) >= 50
    path = tmp_path / "good.gguf"
    path.write_bytes(GOOD)
    everything(path)


def test_places_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf", "/dev/null", "\0", "x" * 5000):
        with pytest.raises(XverseError):
            GgufFile.open(path)


@pytest.mark.slow
def test_a_header_of_zeros_in_a_huge_sparse_file_ends_soon(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + packed(STRING, "a")
        file.write(head + array(STRING, 2**22))
        file.truncate(2**36)
    start = time.monotonic()
    with pytest.raises(XverseError):  # the second key is empty
        GgufFile.open(path)
    assert time.monotonic() - start < 20


def everything(path: Path) -> None:
    """All that a load does with a file."""
    file = GgufFile.open(path)
    config_of(file)
    source = GgufWeights(file)
    for name in source.infos():
        source.read(name, torch.float32)


def mutated(data: bytes, rng: random.Random, header: int) -> bytes:
    """`data` with some bytes of its header changed, or cut off, or with a piece moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(header)
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)))
                out[at : at + 8] = struct.pack("<Q", value)
            case 3:
                del out[at : at + rng.randrange(1, 20)]
            case 4:
                out[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 5:
                del out[rng.randrange(len(out)) :]
        header = max(1, min(header, len(out)))
        out = out or bytearray(b"G")
    return bytes(out)


def outcomes(
    data: bytes, header: int, path: Path, times: int, action: Callable[[Path], None]
) -> dict[str, int]:
    """How often `action` succeeds or is refused on mutations of `data`; all else escapes."""
    rng, counts = random.Random(2024), {"read": 0, "refused": 0}
    with path.open("wb") as file:  # one file: to create or empty one takes ten times as long
        for _ in range(times):
            file.seek(0)
            file.write(mutated(data, rng, header))
            file.truncate()
            file.flush()
            try:
                action(path)
                counts["read"] += 1
            except XverseError:
                counts["refused"] += 1
    return counts


@pytest.mark.parametrize("times", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutations_are_read_or_refused(tmp_path: Path, times: int) -> None:
    header = len(GOOD) - sum(len(entry.data) for entry in llama().entries)
    counts = outcomes(GOOD, header, tmp_path / "mutated.gguf", times, everything)
    assert counts["read"] > times / 100
    assert counts["refused"] > times / 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_mutations_of_a_tokenizer_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    tokens = ["<unk>", "<s>", "</s>", *"Ġ▁abcd", "ab", "abc", "<tool>"]
    draft = llama().put("tokenizer.ggml.model", STRING, kind)
    draft.put("tokenizer.ggml.pre", STRING, "smollm")
    draft.put("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))
    draft.put("tokenizer.ggml.token_type", ARRAY, (5, [2, 3, 3, *[1] * (len(tokens) - 4), 4]))
    draft.put("tokenizer.ggml.scores", ARRAY, (F32, [-float(id) for id in range(len(tokens))]))
    draft.put("tokenizer.ggml.merges", ARRAY, (STRING, ["a b", "ab c"]))
    draft.put("tokenizer.ggml.eos_token_id", U32, 2).put("tokenizer.ggml.add_eos_token", BOOL, 1)
    draft.metadata.sort(key=lambda pair: "ggml" not in pair[0])  # the tokenizer comes first
    draft.entries.clear()

    def tokenize(path: Path) -> None:
        tokenizer = tokenizer_of(GgufFile.open(path))
        tokenizer.decode(tokenizer.encode("abc <s> é 12"))

    data = draft.bytes()
    counts = outcomes(data, len(data), tmp_path / "mutated.gguf", 700, tokenize)
    assert counts["read"] > 20
    assert counts["refused"] > 100
