"""GGUF METADATA <-> config.json. Which architecture of llama.cpp a model is, and its numbers.

llama.cpp has no architecture with XVERSE's mixture of experts by name. Its "bailingmoe" computes
the same where the chosen weights are normalized and not scaled: softmax over all experts, the best
few renormalised, and shared experts without a gate beside them (decision 0041).
"""

import re
from collections.abc import Mapping

import torch

from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_header import unreadable
from xverse.errors import XverseError
from xverse.log import warn_once
from xverse.model.rope import inverse_frequencies
from xverse.model.shape import ModelShape

MIXTURE = "bailingmoe"
ARCHITECTURES = ("llama", "xverse", MIXTURE)
CLASSES = {"llama": "LlamaForCausalLM", "xverse": "XverseForCausalLM"}  # by model_type
ROPE_DIVISORS = "rope_freqs.weight"
# There are models of others in "bailingmoe", whose prompts are not ours: this tells them apart.
OUR_MODEL_TYPE = "xverse.model_type"


def architecture_of(shape: ModelShape) -> str:
    """llama.cpp's name of a model of this shape; XverseError where it has no form for it.

    Its "xverse" has a head of its own, no biases, and heads that make up the width; its "llama" has
    all that we have, but for experts beside shared ones.
    """
    plain = not (shape.tie_word_embeddings or shape.attention_bias or shape.mlp_bias)
    scaling = "none" if shape.rope_scaling is None else shape.rope_scaling.rope_type
    if scaling == "dynamic":
        raise _formless(
            "Its rotary base grows with the text (dynamic NTK), and llama.cpp has no such scaling"
        )
    if shape.num_experts and not (plain and scaling != "llama3" and shape.num_shared_experts):
        raise _formless(
            "llama.cpp computes XVERSE's mixture of experts only with shared experts, a head of "
            "its own (not tied), no biases, and no Llama 3 scaling"
        )
    if shape.num_experts:
        return MIXTURE
    whole = shape.head_dim * shape.num_attention_heads == shape.hidden_size
    ours = shape.model_type == "xverse" and plain and whole and scaling != "llama3"
    return "xverse" if ours else "llama"


def _formless(why: str) -> XverseError:
    return XverseError(
        "This model can't be written as a GGUF file.",
        f"{why}.",
        "Export to safetensors instead.",
    )


def numbers_of(shape: ModelShape) -> dict[str, object]:
    """The metadata of a model of this shape; `config_of` a file with it gives the shape again."""
    arch = architecture_of(shape)
    numbers: dict[str, object] = {
        "vocab_size": shape.vocab_size,
        "context_length": shape.max_position_embeddings,
        "embedding_length": shape.hidden_size,
        "block_count": shape.num_hidden_layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_attention_heads,
        "attention.head_count_kv": shape.num_key_value_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.rope_theta,
    }
    scaling = shape.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        numbers |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if shape.num_experts:
        numbers |= {
            "leading_dense_block_count": 0,
            "expert_count": shape.num_experts,
            "expert_used_count": shape.moe_top_k,
            "expert_shared_count": shape.num_shared_experts,
            "expert_feed_forward_length": shape.intermediate_size,
            "expert_weights_norm": True,
            "expert_weights_scale": 1.0,
        }
    marks = {OUR_MODEL_TYPE: shape.model_type} if arch == MIXTURE else {}
    return {"general.architecture": arch, **marks} | {f"{arch}.{k}": v for k, v in numbers.items()}


def config_of(file: GgufFile) -> dict[str, object]:
    """The config.json of the model in `file`; XverseError where it is no Llama or XVERSE model."""
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise XverseError(
            f"{file.path.name} holds a model of architecture {arch!r:.60}.",
            f"GGUF files of these are read: {', '.join(ARCHITECTURES)}.",
            "Use the model's safetensors folder, or a GGUF file of one of these.",
        )
    if (file.get("split.count", int) or 0) > 1:
        raise unreadable(file.path, "it is one part of several, and whole models are read")
    context, theta = _size(file, "context_length"), file.get(f"{arch}.rope.freq_base", float)
    if arch == "xverse" and theta is None and context > 16384:
        warn_once(f"{file.path.name} does not say its rope base; 10000 is assumed.")
    heads, hidden = _size(file, "attention.head_count"), _size(file, "embedding_length")
    model_type = arch if arch != MIXTURE else _own_type(file)
    config: dict[str, object] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
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
    return config | _experts(file, hidden) | _special_ids(file)


def _own_type(file: GgufFile) -> str:
    """The model_type of a mixture that we wrote; XverseError for those of others."""
    own = file.get(OUR_MODEL_TYPE, str)
    normed = file.get(f"{MIXTURE}.expert_weights_norm", bool)
    scale = file.get(f"{MIXTURE}.expert_weights_scale", float)
    if own not in CLASSES or not normed or scale != 1.0:
        raise XverseError(
            f"{file.path.name} holds a mixture of experts that is not XVERSE's.",
            f"Of architecture {MIXTURE!r} those are read whose {OUR_MODEL_TYPE} is set and whose "
            "experts' weights are normalized and not scaled.",
            "Use a file that `xverse export --to gguf` wrote, or the model's safetensors folder.",
        )
    return own


def _experts(file: GgufFile, hidden: int) -> dict[str, object]:
    """What a mixture's config.json says beside a dense one's."""
    arch = file.get("general.architecture", str)
    if arch != MIXTURE:
        if file.get(f"{arch}.expert_count", int):
            raise unreadable(file.path, f"it has experts, and of {arch!r} dense models are read")
        return {}
    experts, width = _size(file, "expert_count"), _size(file, "expert_feed_forward_length")
    shared = _size(file, "expert_shared_count")
    for part, expected in (("exps", (experts, width, hidden)), ("shexp", (shared * width, hidden))):
        tensor = file.tensors.get(f"blk.0.ffn_gate_{part}.weight")
        if tensor is None or tensor.shape != expected:
            found = tensor and tensor.shape
            raise unreadable(file.path, f"its ffn_gate_{part} is {found}, not {expected}")
    return {
        "intermediate_size": width,
        "num_experts": experts,
        "moe_top_k": _size(file, "expert_used_count"),
        "num_shared_experts": shared,
    }


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
    arch = file.get("general.architecture", str)
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
