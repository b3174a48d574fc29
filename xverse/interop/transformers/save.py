"""MODEL -> FOLDER. A model of transformers' kind as a folder that every reader knows."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig

from xverse.checkpoint.convert import INDEX, save_weights
from xverse.errors import XverseError
from xverse.files import read_json, write_json
from xverse.interop.transformers.config import XverseConfig

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save(
    tensors: Iterator[tuple[str, Tensor]],
    config: XverseConfig,
    generation_config: GenerationConfig | None,
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
) -> None:
    """Write a model folder; weights that it held before are taken out once the new ones stand."""
    target = Path(folder).expanduser()
    save_weights(tensors, target, max_shard_bytes=_bytes(max_shard_size))
    table = read_json(target / INDEX)["weight_map"]
    assert isinstance(table, dict), "written just now"
    for path in target.glob("model*.safetensors"):
        if path.name not in table.values():
            path.unlink()
    fields = config.to_published() | {"architectures": ["XverseForCausalLM"]}
    write_json(target / "config.json", fields)
    if generation_config is not None:
        write_json(target / "generation_config.json", generation_config.to_diff_dict())


def _bytes(size: int | str) -> int:
    """Bytes of a size such as 5000000 or "5GB"."""
    written = re.fullmatch(r"(\d+)\s*([KMG]B)", str(size).strip().upper())
    if written:
        size = int(written[1]) * UNITS[written[2]]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise XverseError(
            f"A shard cannot have the size {size!r:.40}.",
            "It is a number of bytes.",
            'Give for example 5_000_000_000 or "5GB".',
        )
    return size
