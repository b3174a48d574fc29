"""MACHINE -> TOKENS. How many tokens of keys and values there shall be room for."""

import torch

from xverse.device import free_memory
from xverse.errors import XverseError
from xverse.model.shape import ModelShape

CONTEXTS = 16  # whole contexts; more is seldom read again before it is old
SHARE = 0.5  # of the memory that is free after the weights


def token_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers."""
    width = shape.num_key_value_heads * shape.head_dim
    return 2 * shape.num_hidden_layers * width * dtype.itemsize


def pool_tokens(shape: ModelShape, dtype: torch.dtype, device: torch.device, sequences: int) -> int:
    """Room for 16 full contexts, or one for each sequence if they are fewer, within half of what
    memory is free. On a CPU memory is taken from the system only as it fills."""
    wanted = min(CONTEXTS, sequences) * shape.context_length
    free = free_memory(device)
    tokens = min(wanted, int(SHARE * free) // token_bytes(shape, dtype))
    if tokens < 1:
        raise XverseError(
            "No memory is left for the keys and values of a conversation.",
            f"{free / 2**20:.0f} MiB are free beside the model.",
            "Free memory, use a smaller model or quantize it.",
        )
    return tokens
