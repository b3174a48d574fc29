"""Safetensors in pieces: what their own library reads, and what is told of the file."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from xverse.train import shard_file
from xverse.train.shard_file import write_safetensors


@pytest.mark.parametrize("piece", [7, 2**24])
def test_the_library_reads_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(shard_file, "PIECE", piece)
    given = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(5, 2),
        "turned": torch.randn(4, 3).T,
        "number": torch.tensor(7),
        "nothing": torch.zeros(0, 4),
    }
    file = tmp_path / "a.safetensors"
    facts = write_safetensors(file, given, {"why": "a test"})
    content = file.read_bytes()
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with safe_open(file, "pt") as read:
        assert read.metadata() == {"why": "a test"}
        assert set(read.keys()) == set(given)
        for name, tensor in given.items():
            assert torch.equal(read.get_tensor(name), tensor)
            assert read.get_tensor(name).dtype == tensor.dtype
