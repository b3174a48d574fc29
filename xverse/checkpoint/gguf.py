"""GGUF -> TENSORS. A GGUF file: its metadata, and Llama weights under Hugging Face names."""

import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from xverse.checkpoint.gguf_blocks import kind_named
from xverse.checkpoint.gguf_header import GgufTensor, read_header, unreadable
from xverse.checkpoint.weights import TensorInfo
from xverse.errors import XverseError
from xverse.log import warn_once
from xverse.model.rope import inverse_frequencies
from xverse.model.shape import ModelShape

ELEMENTS_AT_ONCE = 2**20  # unpacked through fp32 in pieces of 4 MB, which stay in the cache

Scalar = TypeVar("Scalar", str, int, float, bool)


class GgufFile:
    """A GGUF file, mapped read-only: metadata and tensor places are read and checked on opening."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._data = data
        metadata, tensors = read_header(path, data)
        self.metadata: Mapping[str, object] = MappingProxyType(metadata)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """The file at `path`; XverseError where it is absent, damaged or of another format."""
        path = Path(path)
        try:
            if not path.is_file():
                raise XverseError(
                    f"There is no file {path}.",
                    "Nothing is there, or it is a folder or a device.",
                    "Give the path of a .gguf file.",
                )
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: empty, or a path with a null byte
            raise unreadable(path, str(error)) from error
        return cls(path, data)

    def get(self, key: str, kind: type[Scalar]) -> Scalar | None:
        """The metadata value `key`, or None without one; XverseError for another type or a NaN."""
        value = self.metadata.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or (type(value) is kind and _finite(value)):
            return value
        raise unreadable(
            self.path, f"{key} is {value!r:.60}, and a finite {kind.__name__} is wanted"
        )

    def get_list(self, key: str, kind: type[Scalar]) -> list[Scalar] | None:
        """The metadata array `key` of one kind of scalar, or None without one."""
        values = self.metadata.get(key)
        if values is None:
            return None
        if isinstance(values, list) and all(type(one) is kind and _finite(one) for one in values):
            return values
        raise unreadable(self.path, f"{key} is not a list of finite {kind.__name__} values")

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, unpacked in fp32 and cast to `dtype`, in memory of its own."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise unreadable(self.path, f"it holds no tensor {name!r:.80}")
        kind = kind_named(tensor.kind)
        out = torch.empty(tensor.shape, dtype=dtype)
        flat, packed = out.view(-1), memoryview(self._data)
        step = ELEMENTS_AT_ONCE // kind.elements * kind.nbytes
        for at in range(0, tensor.nbytes, step):
            start, stop = tensor.offset + at, tensor.offset + min(at + step, tensor.nbytes)
            blocks = torch.frombuffer(bytearray(packed[start:stop]), dtype=torch.uint8)
            values = kind.unpack(blocks.view(-1, kind.nbytes)).view(-1)
            first = at // kind.nbytes * kind.elements
            flat[first : first + len(values)] = values
        return out


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


ARCHITECTURES = {"llama": "LlamaForCausalLM", "xverse": "XverseForCausalLM"}

OUTSIDE_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"


def config_of(file: GgufFile) -> dict[str, object]:
    """The config.json of the model in `file`; XverseError where it is no Llama or XVERSE model."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise XverseError(
            f"{file.path.name} holds a model of architecture {arch!r:.60}.",
            f"GGUF files of these are read: {', '.join(ARCHITECTURES)}.",
            "Use the model's safetensors folder, or a GGUF file of one of these.",
        )
    for key, most in (("split.count", 1), (f"{arch}.expert_count", 0)):
        if (file.get(key, int) or 0) > most:
            raise unreadable(file.path, f"{key} is above {most}; whole dense models are read")
    context, theta = _size(file, "context_length"), file.get(f"{arch}.rope.freq_base", float)
    if arch == "xverse" and theta is None and context > 16384:
        warn_once(f"{file.path.name} does not say its rope base; 10000 is assumed.")
    heads, hidden = _size(file, "attention.head_count"), _size(file, "embedding_length")
    config: dict[str, object] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_size": hidden,
        "intermediate_size": _size(file, "feed_forward_length"),
        "num_hidden_layers": _layers(file),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, "attention.head_count_kv", heads),
        "head_dim": _head_dim(file, max(hidden // heads, 1)),
        "vocab_size": _rows(file, "token_embd.weight"),
        "max_position_embeddings": context,
        "rms_norm_eps": file.get(f"{arch}.attention.layer_norm_rms_epsilon", float) or 1e-6,
        "rope_theta": theta or 10000.0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "hidden_act": "silu",
    }
    config["rope_scaling"] = _rope_scaling(file, config)
    return config | _special_ids(file)


def _size(file: GgufFile, key: str, default: int | None = None) -> int:
    """A count under the architecture's prefix; at least 1."""
    key = f"{file.get('general.architecture', str)}.{key}"
    value = file.get(key, int)
    value = default if value is None else value
    if value is None or not 0 < value < 2**31:
        raise unreadable(file.path, f"{key} is {value!r}, which is not a possible size")
    return value


def _layers(file: GgufFile) -> int:
    """The number of layers, which must be those that the tensors belong to."""
    stated = _size(file, "block_count")
    found = (re.match(r"blk\.(\d{1,6})\.", name) for name in file.tensors)
    present = {int(match[1]) for match in found if match}
    if len(present) != stated or max(present) != stated - 1:
        raise unreadable(file.path, f"it states {stated} layers and holds {len(present)}")
    return stated


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise unreadable(
            file.path, f"it holds no tensor {name}: an adapter, or one part of a model"
        )
    return file.tensors[name].shape[0]


def _head_dim(file: GgufFile, default: int) -> int:
    head_dim = _size(file, "attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _size(file, key, head_dim) != head_dim:
            raise unreadable(file.path, f"its {key} is not the size of its heads, {head_dim}")
    return head_dim


def _special_ids(file: GgufFile) -> dict[str, object]:
    """Token ids; an end of turn of its own joins the end of text in a list, as in config.json."""
    ids: dict[str, object] = {}
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = file.get(f"tokenizer.ggml.{stored}_token_id", int)
        if value is not None:
            ids[f"{key}_token_id"] = value
    turn_end = file.get("tokenizer.ggml.eot_token_id", int)
    if turn_end not in (None, ids.get("eos_token_id")):
        ids["eos_token_id"] = [ids["eos_token_id"], turn_end] if "eos_token_id" in ids else turn_end
    return ids


def _rope_scaling(file: GgufFile, config: Mapping[str, object]) -> dict[str, object] | None:
    arch = config["model_type"]
    kind = file.get(f"{arch}.rope.scaling.type", str) or "linear"
    factor = file.get(f"{arch}.rope.scaling.factor", float)
    factor = factor or file.get(f"{arch}.rope.scale_linear", float) or 1.0
    if kind not in ("none", "linear"):
        raise unreadable(file.path, f"its rope scaling {kind!r:.40} is not known; linear is")
    if ROPE_DIVISORS in file.tensors:
        return _llama3_scaling(file, config)
    return None if kind == "none" or factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _llama3_scaling(file: GgufFile, config: Mapping[str, object]) -> dict[str, object] | None:
    """Llama 3.1's scaling, of which a file keeps one divisor per frequency instead of the rule.

    The rule with the published numbers is computed, and taken if it gives those divisors.
    """
    stored = file.read(ROPE_DIVISORS, torch.float32).view(-1)
    if bool((stored == 1).all()):
        return None
    scaling: dict[str, object] = {
        "rope_type": "llama3",
        "factor": float(stored.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = inverse_frequencies(ModelShape.from_config(config))
    scaled = inverse_frequencies(ModelShape.from_config({**config, "rope_scaling": scaling}))
    if stored.shape != plain.shape or not torch.allclose(plain / scaled, stored, rtol=1e-3):
        raise unreadable(file.path, f"its {ROPE_DIVISORS} follow no rope scaling that we know")
    return scaling


class GgufWeights:
    """The weights of a Llama or XVERSE file under Hugging Face names, in Hugging Face's order."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._config = config_of(file)
        self._stored = {_name(file, name): name for name in file.tensors if name != ROPE_DIVISORS}

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""
        infos = {}
        for name, stored in self._stored.items():
            tensor = self._file.tensors[stored]
            dtype = kind_named(tensor.kind).dtype
            infos[name] = TensorInfo(tensor.shape, dtype, tensor.nbytes, self._file.path.name)
        return infos

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of the Hugging Face name `name` in `dtype`, in memory of its own."""
        if name not in self._stored:
            raise unreadable(self._file.path, f"it holds nothing for {name!r:.80}")
        weight = self._file.read(self._stored[name], dtype)
        if ".q_proj." in name:
            return self._split_halves(weight, name, "num_attention_heads")
        if ".k_proj." in name:
            return self._split_halves(weight, name, "num_key_value_heads")
        return weight

    def _split_halves(self, weight: Tensor, name: str, heads_key: str) -> Tensor:
        """Rows of q or k as Hugging Face's rotary embedding pairs them.

        llama.cpp's converters put the two elements of a pair side by side (x0 y0 x1 y1 ...); here
        the first elements of a head's pairs come first, then the second (x0 x1 ... y0 y1 ...).
        """
        heads = self._config[heads_key]
        assert isinstance(heads, int)
        if len(weight) % (2 * heads):
            raise unreadable(self._file.path, f"{name} has {len(weight)} rows for {heads} heads")
        pairs = weight.view(heads, -1, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)


def pair_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse: rows of q or k of a Hugging Face model, as llama.cpp wants them."""
    halves = weight.view(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _name(file: GgufFile, stored: str) -> str:
    """The Hugging Face name of a Llama tensor that llama.cpp calls `stored`."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", stored)
    if match:
        layer, part, what = match.groups()
        if layer is None and part in OUTSIDE_LAYERS:
            return f"{OUTSIDE_LAYERS[part]}.{what}"
        if layer is not None and part in IN_LAYERS:
            return f"model.layers.{layer}.{IN_LAYERS[part]}.{what}"
    raise unreadable(file.path, f"a Llama model has no tensor {stored!r:.80}")
