"""SHAPE -> ARITHMETIC. Floating point operations of a token, and the share of the peak they are."""

import torch

from xverse.model.shape import ModelShape

# Dense bf16 operations a second by NVIDIA's data sheets; the first name that a card's name has.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def strict(shape: ModelShape, row_tokens: int) -> int:
    """Operations of training one token: 6 x parameters without the input embedding, and
    6 x layers x width x sequence, which is attention counted causal. Only chosen experts count."""
    tied = shape.tie_word_embeddings
    inside = shape.num_active_parameters - (0 if tied else shape.vocab_size * shape.hidden_size)
    return 6 * inside + 6 * _attention(shape) * row_tokens


def palm(shape: ModelShape, row_tokens: int) -> int:
    """The same by PaLM's formula (Chowdhery et al. 2022, appendix B): all parameters, and
    12 x layers x width x sequence, which is attention counted full."""
    return 6 * shape.num_active_parameters + 12 * _attention(shape) * row_tokens


def peak(device: torch.device) -> float | None:
    """Operations a second of the card, where we know it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((speed for known, speed in PEAKS.items() if known in name), None)


def _attention(shape: ModelShape) -> int:
    return shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
