"""TRAINED WEIGHTS -> MODEL FOLDER. What `xverse chat` and every other verb can take."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from xverse.checkpoint.convert import save_weights
from xverse.checkpoint.folder import MANIFEST, write_manifest
from xverse.checkpoint.save import expert_name
from xverse.files import write_json
from xverse.model.shape import ModelShape
from xverse.parallel.ranks import Ranks
from xverse.text.chat import ChatFormat, chat_format
from xverse.text.tokenizer import Tokenizer

ASIDE = ".model.partial"


def publish(
    folder: Path,
    shape: ModelShape,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    ranks: Ranks,
    *,
    dtype: torch.dtype,
    chat: ChatFormat | None = None,
    generation: Mapping[str, object] | None = None,
    **facts: object,
) -> None:
    """Write the model into `folder`, rank 0 alone; the others only give their parts of `weights`.

    `chat` is the format that conversations are written in, by default the shape's own one;
    `generation` what generation_config.json holds beside the ids. Everything is written
    beside first, and moved into place with the manifest last: a folder that has a manifest.json is
    whole. `facts` go into it.
    """
    if not ranks.first:
        for _ in weights:
            pass
        return
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_weights(_published(weights, dtype), aside)
    config = shape.to_config() | {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "initializer_range": 0.02,
    }
    ids = {
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    config |= {name: id for name, id in ids.items() if id is not None}
    write_json(aside / "config.json", config)
    own = {name: id for name, id in ids.items() if id is not None}
    write_json(aside / "generation_config.json", own | dict(generation or {}))
    if chat is None and shape.model_type == "xverse":
        chat = chat_format(config, tokenizer)
    tokenizer.save(
        aside,
        chat_template=chat.template if chat else None,
        chat_format=chat.name if chat else None,
    )
    write_manifest(aside, **facts)
    (folder / MANIFEST).unlink(missing_ok=True)  # until all is in place, the folder is not whole
    for old in folder.glob("model-*-of-*.safetensors"):
        old.unlink()
    for file in sorted(aside.iterdir(), key=lambda file: (file.name == MANIFEST, file.name)):
        file.replace(folder / file.name)
    aside.rmdir()


def _published(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Under the published names, experts one by one; the router keeps its fp32."""
    for name, weight in weights:
        wanted = torch.float32 if name.endswith("router.weight") else dtype
        rounded = weight.detach().to(wanted).cpu()
        if ".mlp.experts." not in name:
            yield name, rounded
            continue
        prefix = name.removesuffix(".weight")
        for number, expert in enumerate(rounded):
            yield f"{expert_name(prefix, number)}.weight", expert
