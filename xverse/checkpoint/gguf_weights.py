"""GGUF TENSORS <-> HUGGING FACE NAMES. What llama.cpp calls each weight, and in which order it is.

Two things are stored in another form: the rows of q and k, and the experts of a block, which are
one stack [X, rows, columns] instead of a tensor each.
"""

import re

import torch
from torch import Tensor

from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_blocks import kind_named
from xverse.checkpoint.gguf_config import ROPE_DIVISORS, config_of
from xverse.checkpoint.gguf_header import unreadable
from xverse.checkpoint.save import expert_name
from xverse.checkpoint.weights import TensorInfo

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
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}


class GgufWeights:
    """The weights of a Llama or XVERSE file under Hugging Face names, in Hugging Face's order."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._config = config_of(file)
        # Hugging Face's name -> llama.cpp's, and the number in the stack of a block's experts
        self._stored: dict[str, tuple[str, int | None]] = {}
        for stored in file.tensors:
            if stored != ROPE_DIVISORS:
                self._stored |= self._places(stored)

    def _places(self, stored: str) -> dict[str, tuple[str, int | None]]:
        """Where each of the weights is that the tensor `stored` holds."""
        name = _name(self._file, stored)
        if ".mlp.experts." not in name:
            return {name: (stored, None)}
        shape, experts = self._file.tensors[stored].shape, self._config.get("num_experts", 0)
        if len(shape) != 3 or shape[0] != experts:
            raise unreadable(self._file.path, f"{stored} is {shape}, and there are {experts}")
        stack = name.removesuffix(".weight")
        return {f"{expert_name(stack, at)}.weight": (stored, at) for at in range(shape[0])}

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""
        infos = {}
        for name, (stored, at) in self._stored.items():
            tensor = self._file.tensors[stored]
            dtype = kind_named(tensor.kind).dtype
            shape, nbytes = tensor.shape, tensor.nbytes
            if at is not None:
                shape, nbytes = shape[1:], nbytes // shape[0]
            infos[name] = TensorInfo(shape, dtype, nbytes, self._file.path.name)
        return infos

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of the Hugging Face name `name` in `dtype`, in memory of its own."""
        if name not in self._stored:
            raise unreadable(self._file.path, f"it holds nothing for {name!r:.80}")
        stored, at = self._stored[name]
        weight = self._file.read(stored, dtype, at)
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


def stored_name(name: str) -> str:
    """llama.cpp's name of the tensor `name` of a decoder, experts being stacks there as well."""
    module, _, what = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, part = module.removeprefix("model.layers.").partition(".")
        stored = next(key for key, value in IN_LAYERS.items() if value == part)
        return f"blk.{layer}.{stored}.{what}"
    return f"{next(key for key, value in OUTSIDE_LAYERS.items() if value == module)}.{what}"


def _name(file: GgufFile, stored: str) -> str:
    """The Hugging Face name of a tensor that llama.cpp calls `stored`; of experts the stack's."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)", stored)
    if match:
        layer, part, what = match.groups()
        if layer is None and part in OUTSIDE_LAYERS:
            return f"{OUTSIDE_LAYERS[part]}.{what}"
        if layer is not None and part in IN_LAYERS:
            return f"model.layers.{layer}.{IN_LAYERS[part]}.{what}"
    raise unreadable(file.path, f"a Llama or XVERSE model has no tensor {stored!r:.80}")
