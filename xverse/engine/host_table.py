"""EMBEDDING -> THE HOST'S MEMORY. A table of which a token reads one row need not be on the GPU."""

import torch
from torch import nn

from xverse.errors import XverseError
from xverse.kernels import dispatch, reference
from xverse.model.decoder import Decoder
from xverse.model.embedding import Embedding


def keep_on_host(decoder: Decoder) -> Decoder:
    """Move the embedding to the host's memory, in place; the GPU reads its rows from there.

    XverseError where this cannot be.
    """
    why_not = _why_not(decoder)
    if why_not:
        raise XverseError(
            "The embedding cannot stay in the host's memory.",
            why_not,
            "Leave host_embedding out.",
        )
    table = decoder.model.embed_tokens
    weight_VD = table.weight.data
    pinned_VD = torch.empty(weight_VD.shape, dtype=weight_VD.dtype, pin_memory=True)
    table.weight = nn.Parameter(pinned_VD.copy_(weight_VD), requires_grad=False)
    return decoder


def _why_not(decoder: Decoder) -> str:
    device, dtype, table = decoder.device, decoder.dtype, decoder.model.embed_tokens
    if device.type != "cuda":
        return f"The model is on {device.type}, and that is for memory of GPUs."
    if decoder.lm_head is None:
        return "It is the head, too, which every token reads as a whole."
    if type(table) is not Embedding:
        return "It is quantized, and small already."
    choice = dispatch.embed_rows(device, dtype)
    return f"{choice.reason}." if choice.call is reference.embed_rows else ""
