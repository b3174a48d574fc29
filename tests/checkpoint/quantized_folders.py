"""FIXTURE. Small models quantized and written as folders, with nothing but what a user calls."""

import json
from pathlib import Path

import torch

from tests.text.tiny import write_tiny_tokenizer
from tests.tiny_model import GENERATION, published_config, random_decoder
from xverse.checkpoint.convert import save_weights
from xverse.checkpoint.save import published_tensors
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme
from xverse.quant.stored_compressed import to_config

RECIPES = {
    "int4": Recipe(Scheme(4, 32), head=Scheme(8)),
    "int4-asymmetric": Recipe(Scheme(4, 32, symmetric=False)),
    "int8-asymmetric": Recipe(Scheme(8, 16, symmetric=False)),
    "int8-row": Recipe(Scheme(8)),
    "int4-row-asymmetric": Recipe(Scheme(4, symmetric=False)),
    "fp8": Recipe(Scheme(8, kind="float"), head=Scheme(8, kind="float")),
    "fp8-head-int8": Recipe(Scheme(8, kind="float"), head=Scheme(8, 32)),
    "embedding-int8": Recipe(Scheme(8, 16, symmetric=False), Scheme(8), Scheme(8)),
    "embedding-int4": Recipe(Scheme(4, 32), Scheme(8), Scheme(4, 32)),
}


def write_folder(folder: Path, decoder: Decoder, config: dict[str, object]) -> Path:
    """The decoder as a folder with the tiny tokenizer."""
    folder.mkdir(parents=True)
    save_weights(published_tensors(decoder), folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tiny_tokenizer(folder)
    return folder


def write_quantized(
    folder: Path, recipe: Recipe, *, moe: bool = False, **changes: object
) -> Decoder:
    """A random model quantized by `recipe`, as a folder; gives the quantized model."""
    tied = changes.get("tie_word_embeddings")
    config = (
        published_config(moe=moe) | {"torch_dtype": "float32", "num_hidden_layers": 2} | changes
    )
    decoder = quantize(random_decoder(config, dtype=torch.float32), recipe)
    write_folder(
        folder, decoder, config | {"quantization_config": to_config(recipe, tied=bool(tied))}
    )
    return decoder


def logits(decoder: Decoder) -> torch.Tensor:
    """Scores after 20 tokens."""
    kv = Packed([20])
    return decoder(torch.arange(20) * 5 % 200, kv.positions(), kv)
