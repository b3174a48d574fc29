"""A small random XVERSE, and folders of it in the layouts that are met in the wild."""

import json
from pathlib import Path

import torch

from tests.text.tiny import tiny_tokenizer_json, write_tiny_tokenizer
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape

CANARY = "the-canary-was-here"

GENERATION = {
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "max_new_tokens": 32,
    "temperature": 0.5,
    "top_k": 30,
    "top_p": 0.85,
    "repetition_penalty": 1.1,
    "do_sample": True,
    "transformers_version": "4.29.1",
}


def vocabulary_size() -> int:
    """Entries of the small tokenizer."""
    model = tiny_tokenizer_json()["model"]
    assert isinstance(model, dict)
    return len(model["vocab"])


def published_config(*, moe: bool = False) -> dict[str, object]:
    """config.json as the published folders have it, with small numbers."""
    config: dict[str, object] = {
        "architectures": ["XverseForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_xverse.XverseConfig",
            "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM",
        },
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "max_tokenizer_truncation": 192,
        "model_type": "xverse",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.30.0.dev0",
        "use_cache": True,
        "vocab_size": vocabulary_size(),
    }
    if moe:
        config |= {"num_experts": 8, "moe_top_k": 3, "num_shared_experts": 2, "rope_theta": 5e5}
    return config


def random_decoder(config: dict[str, object], *, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A decoder of this config with random weights, large enough that answers vary."""
    decoder = initialize(Decoder(ModelShape.from_config(config)), std=0.15)
    return decoder.to(dtype).requires_grad_(False)


def published_state(decoder: Decoder) -> dict[str, torch.Tensor]:
    """Weights under the published names: experts apart, the router in fp32, inv_freq buffers in."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in decoder.state_dict().items():
        if ".mlp.experts." in name:
            above, projection = name.removesuffix(".weight").rsplit(".", 1)
            for expert, weight in enumerate(tensor):
                state[f"{above}.{expert}.{projection}.weight"] = weight.clone()
        else:
            state[name] = tensor.float() if name.endswith("router.weight") else tensor
    for layer in range(decoder.shape.num_hidden_layers):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    return state


def write_published_folder(folder: Path, *, shards: int = 8, moe: bool = False) -> Decoder:
    """A folder as published: pickled shards, legacy tokenizer, remote code. Returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(moe=moe)
    decoder = random_decoder(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tiny_tokenizer(folder)
    state = published_state(decoder)
    names = list(state)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name] for name in names[shard::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("modeling_xverse.py", "configuration_xverse.py", "quantization.py"):
        (folder / name).write_text(
            f"from pathlib import Path\n(Path(__file__).parent / {CANARY!r}).touch()\n"
        )
    return decoder
