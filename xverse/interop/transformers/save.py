"""MODEL -> FOLDER. Published tensor names, one expert at a time, as every reader knows them."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig

from xverse.checkpoint.convert import INDEX, MAX_SHARD_BYTES, save_weights
from xverse.checkpoint.folder import read_json, write_json
from xverse.errors import XverseError
from xverse.interop.transformers.config import XverseConfig
from xverse.model.decoder import Decoder
from xverse.model.linear import StackedLinear
from xverse.quant.linear import QuantizedLinear, to_disk

__all__ = ["MAX_SHARD_BYTES", "published_tensors", "save"]

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


def published_tensors(
    decoder: Decoder, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `state` under their names on disk, experts apart, quantized ones packed."""
    for prefix, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            yield from _quantized(prefix, module)
        elif isinstance(module, StackedLinear):
            for number, weight in enumerate(state[f"{prefix}.weight"]):
                yield f"{_of_expert(prefix, number)}.weight", weight
        else:
            for name, _ in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", state[f"{prefix}.{name}"]


def _quantized(prefix: str, layer: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    weight, scale = layer.weight.cpu(), layer.scale.cpu()
    if weight.dim() == 2:
        one = QuantizedLinear(weight, scale, bias, layer.scheme)
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in to_disk(one).items())
        return
    for number in range(len(weight)):
        one = QuantizedLinear(weight[number], scale[number], None, layer.scheme)
        for name, tensor in to_disk(one).items():
            yield f"{_of_expert(prefix, number)}.{name}", tensor


def _of_expert(prefix: str, number: int) -> str:
    """`...experts.gate_proj` -> `...experts.0.gate_proj`."""
    above, _, projection = prefix.rpartition(".")
    return f"{above}.{number}.{projection}"


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
