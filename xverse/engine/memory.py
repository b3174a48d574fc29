"""MACHINE -> TOKENS. How many tokens of keys and values there shall be room for."""

import torch

from xverse.device import free_memory
from xverse.errors import XverseError
from xverse.model.shape import ModelShape

CONTEXTS = 16  # whole contexts on a CPU; more is seldom read again before it is old
SHARE = 0.5  # of the memory that is free after the weights, on a CPU
KEPT = 0.03  # of a GPU's free memory, for what is allocated in pieces and never quite fits


def token_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in all layers; fp8 ones have a 16-bit scale a head."""
    heads = shape.num_key_value_heads
    scale = 2 if dtype == torch.float8_e4m3fn else 0
    return 2 * shape.num_hidden_layers * heads * (shape.head_dim * dtype.itemsize + scale)


def pool_tokens(shape: ModelShape, dtype: torch.dtype, device: torch.device, sequences: int) -> int:
    """On a CPU: room for 16 full contexts, or one for each sequence if they are fewer, within half
    of what memory is free. Memory is taken from the system only as it fills."""
    wanted = min(CONTEXTS, sequences) * shape.context_length
    return _within(wanted, int(SHARE * free_memory(device)), shape, dtype)


def pool_tokens_beside(
    peak: int, shape: ModelShape, dtype: torch.dtype, device: torch.device, sequences: int
) -> int:
    """On a GPU: what is left beside the `peak` bytes that the largest steps were seen to take, or
    a full context for each sequence where that is less."""
    torch.cuda.empty_cache()
    room = int((1 - KEPT) * free_memory(device)) - peak
    return _within(sequences * shape.context_length, room, shape, dtype)


def _within(wanted: int, room: int, shape: ModelShape, dtype: torch.dtype) -> int:
    tokens = min(wanted, room // token_bytes(shape, dtype))
    if tokens < 1:
        raise XverseError(
            "No memory is left for the keys and values of a conversation.",
            f"{max(room, 0) / 2**20:.0f} MiB are free beside the model and its largest step.",
            "Free memory, lower step_tokens or max_running, use a smaller model or quantize it.",
        )
    return tokens


def out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory; PyTorch on a CPU says so only in words."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def too_little_memory(error: BaseException) -> XverseError:
    """What the request hears that was given up so that the others go on."""
    return XverseError(
        "There was no memory to compute this request's next step.",
        str(error).splitlines()[0] if str(error) else "The system refused it.",
        "Ask again when less is running, or lower kv_tokens, step_tokens or max_running.",
    )
