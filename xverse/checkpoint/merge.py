"""BASE + ADAPTER -> MODEL FOLDER. An adapter taken into the weights, one tensor after another."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from xverse.checkpoint import load
from xverse.checkpoint.adapter import Adapter, read_adapter, require_fit
from xverse.checkpoint.convert import copy_rest, save_weights
from xverse.checkpoint.folder import ModelFolder, write_manifest
from xverse.checkpoint.plain import plain_weights
from xverse.checkpoint.weights import Weights
from xverse.checkpoint.whole import require_space, whole_folder
from xverse.errors import XverseError
from xverse.files import read_json, write_json
from xverse.log import progress
from xverse.text.chat import format_named

WIDE = (torch.float32, torch.bfloat16, torch.float16)


def merge(base: Path, adapter_folder: Path, target: Path) -> None:
    """Write the model `base` with the adapter taken in to the new folder `target`, in its dtype.

    A quantized base is computed back to bf16 first, and the new folder is not quantized. The chat
    format that the adapter was trained in is written down. `target` appears whole or not at all;
    raises XverseError for an adapter of another model, and where `target` holds something.
    """
    adapter = read_adapter(adapter_folder)
    if base.is_file():
        raise XverseError(
            f"{base} is a GGUF file, and an adapter is taken into a model folder.",
            "What it stores may be rounded already.",
            "Name the folder that the adapter was trained on.",
        )
    checkpoint = load.open_checkpoint(base)
    require_fit(adapter, checkpoint.shape, str(adapter_folder))
    weights = plain_weights(checkpoint)
    target = target.expanduser().absolute()
    with whole_folder(target) as aside:
        require_space(aside.parent, sum(info.nbytes for info in weights.infos().values()))
        save_weights(_merged(weights, adapter, "quantization_config" in checkpoint.config), aside)
        copy_rest(ModelFolder.open(base), aside)
        _unquantized(aside / "config.json")
        if adapter.chat_format is not None:
            _note_format(aside, adapter.chat_format)
        write_manifest(aside, source=base.name, merged_adapter=adapter_folder.name)


def merged_weight(weight_ND: Tensor, adapter: Adapter, name: str) -> Tensor:
    """The weight of the layer `name` with its change taken in, computed in fp32, in its dtype."""
    change = adapter.weights[name]
    delta_ND = change.b_NR.float() @ change.a_RD.float()
    sum_ND = weight_ND.float() + adapter.scale(name) * delta_ND
    if change.magnitude_N is not None:
        sum_ND *= (change.magnitude_N.float() / sum_ND.norm(dim=-1))[:, None]
    return sum_ND.to(weight_ND.dtype)


def _merged(weights: Weights, adapter: Adapter, quantized: bool) -> Iterator[tuple[str, Tensor]]:
    infos = weights.infos()
    for name, info in progress(infos.items(), total=len(infos), label="merging"):
        wide = info.dtype if info.dtype in WIDE and not quantized else torch.bfloat16
        if name.endswith("mlp.router.weight"):
            wide = info.dtype
        layer = name.removesuffix(".weight")
        if layer == name or layer not in adapter.weights:
            yield name, weights.read(name, wide)
        else:  # in fp32 until the sum is made: a quantized weight is rounded once
            whole = weights.read(name, torch.float32)
            yield name, merged_weight(whole, adapter, layer).to(wide)


def _unquantized(file: Path) -> None:
    config = read_json(file)
    if config.pop("quantization_config", None) is not None:
        write_json(file, config | {"torch_dtype": "bfloat16"})


def _note_format(folder: Path, chat_format: str) -> None:
    """The tokenizer's folder with the chat format that the model now answers in."""
    tokenizer = load.open_tokenizer(folder)
    chat = format_named(chat_format, tokenizer)
    tokenizer.save(folder, chat_template=chat.template, chat_format=chat.name)
