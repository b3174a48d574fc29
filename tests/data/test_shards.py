"""Shards: what is written comes back, and a folder that is not as it was is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xverse.data.shard_writer import ShardWriter, write_index, write_samples, write_shards
from xverse.data.shards import Group, Shards
from xverse.errors import XverseError

DOCUMENTS: list[tuple[list[int], str, str]] = [
    ([5, 6, 7], "en", "books"),
    ([], "zh", "web"),
    ([8], "en", "books"),
    ([9, 9, 9, 9, 9], "zh", "web"),
    ([4, 4], "python", "code"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, DOCUMENTS, vocab_size=300, end_id=3, shard_tokens=5)
    return tmp_path


def test_documents_come_back_in_order_with_their_end(folder: Path) -> None:
    shards = Shards.open(folder, verify=True)
    assert shards.documents == 5
    assert shards.tokens == 11 + 5
    assert len(shards.shards) == 3
    assert [shards.document(i).tolist() for i in range(5)] == [[*ids, 3] for ids, _, _ in DOCUMENTS]
    assert shards.lengths().tolist() == [4, 1, 2, 6, 3]
    assert [(shards.language(i), shards.kind(i)) for i in range(5)] == [d[1:] for d in DOCUMENTS]
    assert shards.groups == (
        Group("en", "books", 2, 6, 0),
        Group("python", "code", 1, 3, 0),
        Group("zh", "web", 2, 7, 0),
    )
    assert shards.group_codes().tolist() == [0, 2, 0, 2, 1]


def test_a_document_is_a_view_of_the_file_and_cannot_be_written(folder: Path) -> None:
    document = Shards.open(folder).document(0)
    assert document.dtype == np.uint16
    assert not document.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_the_smallest_dtype_is_taken(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    last = vocab_size - 1
    write_shards(tmp_path, [([last], "en", "web")], vocab_size=vocab_size, end_id=3)
    document = Shards.open(tmp_path).document(0)
    assert document.dtype == dtype
    assert document.tolist() == [last, 3]


@pytest.mark.parametrize("index", [-1, 5, 1 << 40])
def test_there_is_no_such_document(folder: Path, index: int) -> None:
    with pytest.raises(IndexError):
        Shards.open(folder).document(index)


def test_no_documents_at_all(tmp_path: Path) -> None:
    write_shards(tmp_path / "new", [], vocab_size=300, end_id=3)
    shards = Shards.open(tmp_path / "new", verify=True)
    assert (shards.documents, shards.tokens, shards.lengths().tolist()) == (0, 0, [])


def test_samples_choose_what_is_served(folder: Path) -> None:
    whole = Shards.open(folder)
    samples = write_samples(folder, np.array([3, 0, 3], np.uint64), tokens=16)
    write_index(
        folder, whole.shards, tokenizer_sha256="", vocab_size=300, end_id=3, samples=samples
    )
    drawn = Shards.open(folder, verify=True)
    assert (drawn.documents, drawn.tokens, drawn.stored_documents) == (3, 16, 5)
    assert [len(drawn.document(i)) for i in range(3)] == drawn.lengths().tolist() == [6, 4, 6]
    assert drawn.group_codes().tolist() == [2, 0, 2]
    with pytest.raises(IndexError):
        drawn.document(3)


def test_an_id_outside_the_vocabulary_is_never_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 0, vocab_size=300, end_id=3)
    with pytest.raises(AssertionError), writer:
        writer.add([300], language="en", kind="web", num_bytes=1)
    assert not list(tmp_path.iterdir()), "nothing is left of a shard that failed"


def edit(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def test_a_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="xverse prepare"):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"dtype": "float32"},
        {"vocab_size": -1},
        {"end_id": "3"},
        {"shards": 7},
        {"shards": [{}]},
        {"samples": {"documents": 1, "tokens": 1}},
    ],
)
def test_a_damaged_index_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(XverseError, match="can't be used"):
        Shards.open(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../shard-00000"},
        {"documents": 9},
        {"tokens": 10**30},
        {"groups": [["en", "books", 1]]},
        {"groups": [[1, "books", 2, 5, 0]]},
        {"sha256": {"tokens": "0", "offsets": "0", "groups": "0"}},
    ],
)
def test_a_damaged_entry_is_refused(folder: Path, entry: dict[str, Any]) -> None:
    index = json.loads((folder / "index.json").read_text())
    edit(folder, shards=[index["shards"][0] | entry])
    with pytest.raises(XverseError, match="can't be used"):
        Shards.open(folder)


def test_a_file_cut_short_is_refused_at_once(folder: Path) -> None:
    file = folder / "shard-00001.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(XverseError, match=r"shard-00001\.tokens has"):
        Shards.open(folder)


@pytest.mark.parametrize("part", ["tokens", "offsets", "groups"])
def test_a_changed_byte_is_found_by_verify(folder: Path, part: str) -> None:
    file = folder / f"shard-00000.{part}"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    Shards.open(folder)
    with pytest.raises(XverseError, match="sha256 differs"):
        Shards.open(folder, verify=True)


def test_offsets_that_do_not_rise_are_refused(folder: Path) -> None:
    file = folder / "shard-00000.offsets"
    file.write_bytes(np.array([0, 5, 5], "<u8").tobytes())
    with pytest.raises(XverseError, match="does not rise"):
        Shards.open(folder).lengths()


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 70_000), max_size=20),
            st.sampled_from(["en", "zh", "ja"]),
            st.sampled_from(["web", "code"]),
        ),
        max_size=30,
    ),
    st.integers(1, 60),
)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[list[int], str, str]],
    shard_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, documents, vocab_size=70_001, end_id=3, shard_tokens=shard_tokens)
    shards = Shards.open(folder, verify=True)
    assert [shards.document(i).tolist() for i in range(shards.documents)] == [
        [*ids, 3] for ids, _, _ in documents
    ]
    codes = shards.group_codes().tolist()
    assert [shards.group(i) for i in range(len(codes))] == [shards.groups[c] for c in codes]
