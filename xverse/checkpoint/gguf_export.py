"""MODEL -> GGUF. A model folder (or GGUF file) as one GGUF file that llama.cpp runs.

Written in the ways of llama.cpp's own converters: the rows of q and k are paired for its rotary
embedding, the experts of a block are one stack, norms, biases and routers stay fp32, and the mixed
kinds keep the head at six bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_blocks import kind_named
from xverse.checkpoint.gguf_config import ROPE_DIVISORS, numbers_of
from xverse.checkpoint.gguf_tokenizer import CHAT_FORMAT, tokenizer_of
from xverse.checkpoint.gguf_vocab import differing, vocabulary_of
from xverse.checkpoint.gguf_weights import pair_halves, stored_name
from xverse.checkpoint.gguf_write import Outgoing, write_gguf
from xverse.checkpoint.load import Checkpoint, open_checkpoint, open_tokenizer
from xverse.checkpoint.plain import plain_weights
from xverse.checkpoint.save import expert_name, published_tensors
from xverse.checkpoint.weights import TensorInfo, Weights, is_router
from xverse.errors import XverseError
from xverse.log import logger
from xverse.model.decoder import Decoder
from xverse.model.rope import inverse_frequencies
from xverse.model.shape import ModelShape
from xverse.text.chat import chat_format
from xverse.text.tokenizer import Tokenizer

# --type -> (kind of the matrices, llama.cpp's number for such a file)
TYPES = {
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q6_k": ("Q6_K", 18),
    "q4_k": ("Q4_K", 15),
    "q4_0": ("Q4_0", 2),
}
# Rows that are no whole blocks of 256 are written in blocks of 32 of at least as many bits.
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
CUT_LENGTH = 1024  # bytes of a text that llama-cpp-python 0.3.36 reads one byte short of
QUANTIZATION_VERSION = 2  # of ggml's block layouts; 2 since May 2023


@dataclass(frozen=True)
class Exported:
    """What was written, and how its tokenizer was checked against the model's own."""

    path: Path
    nbytes: int
    kinds: Mapping[str, int]  # how many tensors of each kind
    texts_checked: int
    texts_differing: int

    def facts(self) -> dict[str, object]:
        """The same as JSON values."""
        return {
            "file": str(self.path),
            "bytes": self.nbytes,
            "tensors": dict(self.kinds),
            "tokenizer": {"texts": self.texts_checked, "differing": self.texts_differing},
        }


def export_gguf(model: Path, target: Path, type: str = "f16") -> Exported:
    """Write the model folder or GGUF file `model` to the new file `target`, of `TYPES[type]`.

    One tensor, of a mixture one expert's, is in memory at a time; `target` appears whole or not at
    all. Quantized folders are computed back to numbers first. Raises XverseError for models or
    tokenizers that llama.cpp has no form for.
    """
    checkpoint, tokenizer = open_checkpoint(model), open_tokenizer(model)
    shape = checkpoint.shape
    numbers = numbers_of(shape)  # first: it refuses what llama.cpp has no form for
    tensors = _tensors(shape, plain_weights(checkpoint), type)
    metadata = {
        **numbers,
        **_general(checkpoint, type),
        **vocabulary_of(tokenizer, shape.vocab_size, checkpoint.end_ids),
        **_template(checkpoint, tokenizer),
    }
    write_gguf(target, metadata, tensors)
    kinds = [tensor.kind for tensor in tensors]
    _name_others(type, kinds)
    checked, wrong = differing(tokenizer, tokenizer_of(GgufFile.open(target)))
    if wrong:
        logger.warning("%d of %d texts have other ids in %s", wrong, checked, target.name)
    return Exported(
        target,
        target.stat().st_size,
        {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        checked,
        wrong,
    )


def _name_others(type: str, kinds: list[str]) -> None:
    """Say what is stored in another kind than was asked for, and not by llama.cpp's own custom."""
    others = sum(kind in (*SMALLER_BLOCKS.values(), "F16") for kind in kinds)
    if type in ("q4_0", "q4_k", "q6_k") and others:
        logger.info(
            "%d tensors have rows that are no whole blocks: they are Q5_0, Q8_0 or F16", others
        )


def _general(checkpoint: Checkpoint, type: str) -> dict[str, object]:
    return {
        "general.name": checkpoint.title,
        "general.file_type": TYPES[type][1],
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _template(checkpoint: Checkpoint, tokenizer: Tokenizer) -> dict[str, object]:
    if checkpoint.shape.model_type != "xverse" and tokenizer.chat_template is None:
        return {}
    chat = chat_format(checkpoint.config, tokenizer)
    template = chat.template
    if len(template.encode()) == CUT_LENGTH:
        template += "\n"  # which Jinja takes away again
    return {"tokenizer.chat_template": template, CHAT_FORMAT: chat.name}


def _tensors(shape: ModelShape, weights: Weights, type: str) -> list[Outgoing]:
    """All tensors of the file; XverseError where the weights are not those of `shape`."""
    infos = weights.infos()
    with torch.device("meta"):
        decoder = Decoder(shape)
    if shape.tie_word_embeddings:
        infos.pop("lm_head.weight", None)
    _compare({name: tuple(one.shape) for name, one in published_tensors(decoder)}, infos)
    tensors = []
    for name, tensor in decoder.state_dict().items():
        dims = tuple(tensor.shape)
        stack = name.removesuffix(".weight")
        names = [f"{expert_name(stack, at)}.weight" for at in range(dims[0])]
        parts = [
            _reading(one, shape, partial(weights.read, one, infos[one].dtype))
            for one in (names if len(dims) == 3 else [name])
        ]
        tensors.append(Outgoing(stored_name(name), dims, _kind(name, dims, shape, type), parts))
    divisors = _divisors(shape)
    if divisors is not None:
        tensors.append(Outgoing(ROPE_DIVISORS, tuple(divisors.shape), "F32", [lambda: divisors]))
    return tensors


def _compare(wanted: Mapping[str, tuple[int, ...]], infos: Mapping[str, TensorInfo]) -> None:
    found = {name: info.shape for name, info in infos.items()}
    if found != wanted:
        wrong = sorted(
            name for name in wanted.keys() | found if wanted.get(name) != found.get(name)
        )
        raise XverseError(
            f"config.json and the weights belong to different models: {', '.join(wrong[:4])}.",
            f"{len(wrong)} tensors are absent, too many or of another shape.",
            "Fetch both from the same place again.",
        )


def _reading(name: str, shape: ModelShape, read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    heads = {
        "q_proj": shape.num_attention_heads,
        "k_proj": shape.num_key_value_heads,
    }.get(name.split(".")[-2])
    return read if heads is None else lambda: pair_halves(read(), heads)


def _kind(name: str, dims: tuple[int, ...], shape: ModelShape, type: str) -> str:
    """The kind of one tensor: llama.cpp's mixtures, where q4_k is its Q4_K_M."""
    if len(dims) == 1 or is_router(name):
        return "F32"
    kind = TYPES[type][0]
    head = "lm_head" if not shape.tie_word_embeddings else "embed_tokens"
    if kind in ("Q4_0", "Q4_K") and head in name:
        kind = "Q6_K"
    elif kind == "Q4_K" and name.split(".")[-2] in ("v_proj", "down_proj"):
        layer, layers = int(name.split(".")[2]), shape.num_hidden_layers
        outer = layer < layers // 8 or layer >= 7 * layers // 8
        kind = "Q6_K" if outer or (layer - layers // 8) % 3 == 2 else kind
    if dims[-1] % kind_named(kind).elements:
        kind = SMALLER_BLOCKS.get(kind, kind)
    return kind if dims[-1] % kind_named(kind).elements == 0 else "F16"


def _divisors(shape: ModelShape) -> Tensor | None:
    """By what Llama 3's scaling divides each frequency, [E/2] fp32; None without it."""
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type != "llama3":
        return None
    return inverse_frequencies(replace(shape, rope_scaling=None)) / inverse_frequencies(shape)
