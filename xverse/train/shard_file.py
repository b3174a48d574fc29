"""TENSORS -> SAFETENSORS, PIECE BY PIECE. What a rank writes of a checkpoint.

PyTorch's own writer makes one string of the whole file before it writes, and holds the interpreter
meanwhile: at 7B that is 44 GB of memory twice more, and seconds in which no step is launched. Here
the tensors go to the disk as they lie in memory, and are hashed on the way.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from xverse.checkpoint.weights import SAFETENSORS_DTYPES

PIECE = 2**24  # bytes that are hashed and written at a time, without the interpreter's lock
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class ShardWriter(HuggingFaceStorageWriter):
    """Writes what the plan of torch.distributed.checkpoint gives a rank into one file, which its
    reader for safetensors reads. `facts` are bytes and sha256 of the file, by its name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.facts: dict[str, dict[str, object]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
        tensors: dict[str, Tensor] = {}
        places: dict[str, object] = {}
        results = []
        for item in plan.items:
            assert item.tensor_data is not None, "a checkpoint has tensors alone"
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensors[item.index.fqn] = tensor.detach()
            places[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(item.index, tensor.nbytes, name))
        about = {
            CUSTOM_METADATA_KEY: json.dumps(places),
            DCP_VERSION_KEY: str(HF_DCP_VERSION),
            FORMAT_KEY: FORMAT_VALUE,
        }
        if tensors:
            self.facts[name] = write_safetensors(self.folder / name, tensors, about)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]
) -> dict[str, object]:
    """Write a file that is on the disk when this returns; its bytes and sha256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in _pieces(tensors, about):
            digest.update(piece)
            size += len(piece)
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _pieces(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Iterator[memoryview]:
    """The header, filled up to 8 bytes, and the memory of every tensor."""
    header: dict[str, object] = {"__metadata__": dict(about)}
    # Wide elements first, as the format's own writer has them: all are aligned then.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in ordered:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        flat = tensors[name].contiguous().view(-1)
        content = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        for start in range(0, len(content), PIECE):
            yield content[start : start + PIECE]
