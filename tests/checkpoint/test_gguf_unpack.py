"""A GGUF file as a model folder: the same numbers under the same names, and the same ids."""

from pathlib import Path

import pytest
import torch

from tests.tiny_model import write_published_folder
from xverse.checkpoint.gguf_export import export_gguf
from xverse.checkpoint.gguf_unpack import unpack_gguf
from xverse.checkpoint.load import load
from xverse.errors import XverseError


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("q8_0", torch.bfloat16)])
def test_the_folder_is_the_file(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    write_published_folder(tmp_path / "published")
    export_gguf(tmp_path / "published", tmp_path / "model.gguf", kind)
    assert unpack_gguf(tmp_path / "model.gguf", tmp_path / "folder") == dtype
    name = str(dtype).removeprefix("torch.")
    file = load(tmp_path / "model.gguf", dtype=name, device="cpu")
    folder = load(tmp_path / "folder", device="cpu")
    again = load(tmp_path / "folder", dtype=name, device="cpu")
    expected = dict(file.decoder.named_parameters())
    found = dict(again.decoder.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    text = "Hello, 你好 <|endoftext|>\n  12"
    assert folder.tokenizer.encode(text) == file.tokenizer.encode(text)
    assert folder.end_ids == file.end_ids


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "published")
    export_gguf(tmp_path / "published", tmp_path / "model.gguf", "f16")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    with pytest.raises(XverseError, match="folder"):
        unpack_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine"]


def test_a_damaged_file_leaves_nothing_behind(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "published")
    export_gguf(tmp_path / "published", tmp_path / "model.gguf", "f16")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(XverseError):
        unpack_gguf(tmp_path / "cut.gguf", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
