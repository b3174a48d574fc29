"""GGUF FILE -> MODEL FOLDER. Its numbers as safetensors: what can be trained, or quantized anew."""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from xverse.checkpoint.convert import save_tokenizer, save_weights
from xverse.checkpoint.folder import write_manifest
from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_config import config_of
from xverse.checkpoint.gguf_tokenizer import tokenizer_of
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.checkpoint.weights import TensorInfo, is_router
from xverse.checkpoint.whole import require_space, whole_folder
from xverse.files import write_json
from xverse.log import progress


def unpack_gguf(source: Path, target: Path) -> torch.dtype:
    """Write the model of the file `source` to the new folder `target`, and give its dtype.

    Rounded blocks become bf16; a file without any keeps the dtype of its matrices. `target` appears
    whole or not at all. Raises XverseError as `GgufFile.open`, and where `target` holds something.
    """
    file = GgufFile.open(source)
    weights, config = GgufWeights(file), config_of(file)
    infos = weights.infos()
    dtype = _dtype_of(infos)
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}

    def read() -> Iterator[tuple[str, Tensor]]:
        for name in progress(infos, total=len(infos), label="unpacking"):
            yield name, weights.read(name, torch.float32 if is_router(name) else dtype)

    with whole_folder(target.expanduser().absolute()) as aside:
        numbers = sum(prod(info.shape) for info in infos.values())
        require_space(aside.parent, numbers * dtype.itemsize)
        save_weights(read(), aside)
        write_json(aside / "config.json", config)
        save_tokenizer(tokenizer_of(file), config, aside)
        write_manifest(
            aside, source=source.name, converted_to="safetensors", rounded=_rounded(infos)
        )
    return dtype


def _dtype_of(infos: Mapping[str, TensorInfo]) -> torch.dtype:
    if _rounded(infos):
        return torch.bfloat16
    return next(info.dtype for info in infos.values() if len(info.shape) > 1)


def _rounded(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether some tensor is stored in blocks of integers."""
    return any(info.nbytes < prod(info.shape) * info.dtype.itemsize for info in infos.values())
