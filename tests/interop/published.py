"""FIXTURE. A published folder as transformers' Auto classes load it, and what to ask of it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from xverse.interop.transformers import XverseForCausalLM, XverseTokenizerFast

HISTORY = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "您好！"},
    {"role": "user", "content": "The weather in 中国?"},
]
GREEDY = GenerationConfig(max_new_tokens=24, do_sample=False, repetition_penalty=1.0)
PROMPTS = ["北京的天气", "hello, I am", "今"]


def load_pair(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[XverseForCausalLM, XverseTokenizerFast]:
    """The model and its left-padding tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    assert isinstance(model, XverseForCausalLM)
    assert isinstance(tokenizer, XverseTokenizerFast)
    return model, tokenizer


def same_state(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether both have the same tensors, to the bit, under the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(
        theirs[name].dtype == ours[name].dtype and torch.equal(theirs[name], ours[name])
        for name in ours
    )
